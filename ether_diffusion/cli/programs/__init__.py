"""The programs of the verbs: the words of a command line, then the imports that take seconds, then the work.

``--help`` and a mistake in the settings are answered before torch and diffusers are imported. What a program does is a
function of a room below; nothing but the command line is here.
"""
