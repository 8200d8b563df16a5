"""Errors that end a command with a single line: a user's mistake, and a run that cannot go on."""

from __future__ import annotations


class InputError(ValueError):
    """A user's mistake: bad data, a bad setting or a missing file.

    The command line prints ``str(error)`` and exits with code 2. The line reads
    ``client 'ct_a', case 'lung_01', field 'spacing': <what is wrong>; <fix>``, leaving out the parts that are unknown.

    Args:
        message: what is wrong, with the expected and the found value.
        client: name of the client the data belong to.
        case: identifier of the case.
        field: the setting, key, column or header field at fault.
        fix: what the user can do about it.
    """

    def __init__(
        self,
        message: str,
        *,
        client: str | None = None,
        case: str | None = None,
        field: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.message = message
        self.client = client
        self.case = case
        self.field = field
        self.fix = fix
        super().__init__(self._line())

    def _line(self) -> str:
        parts = (("client", self.client), ("case", self.case), ("field", self.field))
        place = ", ".join(f"{name} '{value}'" for name, value in parts if value is not None)
        line = f"{place}: {self.message}" if place else self.message
        if self.fix:
            line = f"{line}; {self.fix}"
        # Names come from the user's files and may hold line breaks or control characters.
        printable = "".join(character if character.isprintable() else " " for character in line)
        return " ".join(printable.split())

    def located(self, *, client: str | None = None, case: str | None = None, field: str | None = None) -> InputError:
        """Returns the same error with the parts filled in that were still unknown."""
        return InputError(
            self.message,
            client=self.client if self.client is not None else client,
            case=self.case if self.case is not None else case,
            field=self.field if self.field is not None else field,
            fix=self.fix,
        )

    def __reduce__(self) -> tuple[object, ...]:
        # Worker processes send their errors back; the default would lose the keyword parts.
        return (_rebuild, (self.message, self.client, self.case, self.field, self.fix))


class RunError(RuntimeError):
    """A run cannot go on though nobody made a mistake: a loss that is no number, a round without updates.

    The command line prints ``str(error)`` and exits with code 1. Finished rounds are kept.
    """


def _rebuild(message: str, client: str | None, case: str | None, field: str | None, fix: str | None) -> InputError:
    return InputError(message, client=client, case=case, field=field, fix=fix)
