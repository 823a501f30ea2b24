"""Looking into a Linux guest from outside: its symbol table, where it runs, its log.

Everything is read from guest memory, and nothing is asked of the guest, which may have crashed.
"""
