"""Writers of finished students."""
