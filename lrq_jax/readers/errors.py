"""The one error of the readers."""


class ReaderError(ValueError):
    """A file that cannot be read as a teacher: says what was found, expected and the way out."""
