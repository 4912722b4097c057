"""Captions of many pictures: ``dyrate caption``. Data parallel, on this machine or a Ray cluster; a killed run goes on where it was."""
