"""Write, read, lock and claim run folders: the only interface between training and everything that reads results."""
