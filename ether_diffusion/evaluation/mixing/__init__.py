"""Two adapters in one picture: how near it comes to the truth, which the drawn world knows."""
