"""The command `doctor`: what is wrong with an installation or a startup kit, and what to do about it."""
