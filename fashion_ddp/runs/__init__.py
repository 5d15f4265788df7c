"""The run folder: written, read, locked and claimed. It is the only interface between training and its readers."""
