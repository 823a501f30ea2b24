"""The version, alone in a module so that the build can read it without importing the rest."""

VERSION = "0.1.0"
