"""Checks of options that several commands share."""

from configs.load import UserError


def at_least(options: object, **least: int) -> None:
    """Refuse options with a number below its least one; None stands for a number that was not given.

    Raises:
        UserError: the message names the flag.
    """
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise UserError(f"--{name.replace('_', '-')} is {value}; write at least {smallest}")
