"""What a bundle and its engines are, for whoever reads or writes them; no library beside numpy."""
