"""The ``dyrate`` command."""
