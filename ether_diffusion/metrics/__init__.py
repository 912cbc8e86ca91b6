"""How well images show a subject and follow a prompt."""
