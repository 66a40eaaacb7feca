"""What only a GPU can tell, in stages that each fill a plain dict."""
