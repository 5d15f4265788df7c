"""Know the machine and its ranks. Importing this package needs no torch; `world` imports it."""
