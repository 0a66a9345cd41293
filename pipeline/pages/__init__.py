"""Web pages: the demonstration and the user study."""
