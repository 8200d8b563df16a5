"""Errors that end a command with a single line: a user's mistake, and a run that cannot go on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_LONGEST_LINE = 1000  # a message may quote from the user's files, which may hold anything


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
        line = " ".join(printable.split())
        return line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE // 2]} ... {line[-_LONGEST_LINE // 4 :]}"

    def located(self, *, client: str | None = None, case: str | None = None, field: str | None = None) -> InputError:
        """Returns the same error with the parts filled in that were still unknown."""
        return InputError(
            self.message,
            client=self.client if self.client is not None else client,
            case=self.case if self.case is not None else case,
            field=self.field if self.field is not None else field,
            fix=self.fix,
        )

    def each(self) -> list[InputError]:
        """Returns the single mistakes this error stands for: itself."""
        return [self]

    def __reduce__(self) -> tuple[object, ...]:
        # Worker processes send their errors back; the default would lose the keyword parts.
        return (_rebuild, (self.message, self.client, self.case, self.field, self.fix))


class InputErrors(InputError):
    """Several mistakes at once: ``str(error)`` is their number and one line for each.

    Args:
        errors: the mistakes, at least two.
    """

    def __init__(self, errors: Sequence[InputError]) -> None:
        self.errors = tuple(errors)
        super().__init__(f"{len(self.errors)} problems")

    def _line(self) -> str:
        return "\n  ".join([f"{self.message}:", *(str(error) for error in self.errors)])

    def located(self, *, client: str | None = None, case: str | None = None, field: str | None = None) -> InputErrors:
        """Returns the same errors with the parts filled in that were still unknown."""
        return InputErrors([error.located(client=client, case=case, field=field) for error in self.errors])

    def each(self) -> list[InputError]:
        """Returns the single mistakes."""
        return list(self.errors)

    def __reduce__(self) -> tuple[object, ...]:
        return (InputErrors, (self.errors,))


class Problems:
    """Collects mistakes, so that a check can go on and report all of them at once.

    Attributes:
        errors: what was found so far.
    """

    def __init__(self) -> None:
        self.errors: list[InputError] = []

    def add(self, error: InputError) -> None:
        """Records a mistake, or the several that the error stands for."""
        self.errors += error.each()

    @contextmanager
    def caught(self, *, client: str | None = None, case: str | None = None, field: str | None = None) -> Iterator[None]:
        """Records an ``InputError`` of the block instead of letting it pass, with the unknown parts filled in."""
        try:
            yield
        except InputError as error:
            self.add(error.located(client=client, case=case, field=field))

    def raise_any(self) -> None:
        """Raises what was recorded, if anything was.

        Raises:
            InputError: the one mistake, or ``InputErrors`` for several.
        """
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise InputErrors(self.errors)


class RunError(RuntimeError):
    """A run cannot go on though nobody made a mistake: a loss that is no number, a round without updates.

    The command line prints ``str(error)`` and exits with code 1. Finished rounds are kept.
    """


def _rebuild(message: str, client: str | None, case: str | None, field: str | None, fix: str | None) -> InputError:
    return InputError(message, client=client, case=case, field=field, fix=fix)
