"""What turns a piece into a callable for one range."""
