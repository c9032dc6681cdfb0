"""Graph passes that apply by range."""
