"""The one error of the application that its user can mend."""


class InputError(ValueError):
    """A file or an option will not do; the text names it, and the commands print it as it is."""
