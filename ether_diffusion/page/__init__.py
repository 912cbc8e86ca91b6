"""Pages that open offline: their frame and style, pictures and figures inside the file."""
