"""The one exception a user's mistake raises, and the nearest-name help it carries."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """A mistake in what the user asked for: shown as one line, never as a traceback.

    ``key`` is the key path or file at fault, ``value`` what was given, ``expected`` what would have been valid.
    """

    def __init__(self, key: str, value: object, expected: str, *, hint: str = "") -> None:
        self.key, self.value, self.expected, self.hint = key, value, expected, hint
        shown = repr(value) if not isinstance(value, str) else f"'{value}'"
        text = f"{key} = {shown}: expected {expected}"
        super().__init__(text + (f". {hint}" if hint else ""))

    def __reduce__(self) -> tuple:  # keeps its fields when a worker process raises it
        return (_rebuild, (self.key, self.value, self.expected, self.hint))


class StudyError(Exception):
    """Something outside the user's settings went wrong (a damaged file, a full disk); one line, with what to do."""


def _rebuild(key: str, value: object, expected: str, hint: str) -> UserError:
    return UserError(key, value, expected, hint=hint)


def closest(name: str, valid: Iterable[str]) -> str | None:
    """The entry of ``valid`` most like ``name``, whatever its case; None when nothing comes near."""
    by_lower = {v.lower(): v for v in sorted(valid)}
    close = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[close[0]] if close else None


def nearest(name: str, valid: Iterable[str]) -> str:
    """``"did you mean 'adam'?"`` for a close match in ``valid``, else an empty string."""
    close = closest(name, valid)
    return f"did you mean '{close}'?" if close else ""


class UserErrors(UserError):
    """Several mistakes at once: one line each, in ``errors`` as they are."""

    def __init__(self, errors: Sequence[UserError]) -> None:
        first = errors[0]
        super().__init__(first.key, first.value, first.expected, hint=first.hint)
        self.errors = list(errors)
        self.args = ("\n".join(str(error) for error in self.errors),)

    def __reduce__(self) -> tuple:
        return (UserErrors, (self.errors,))


def raise_all(errors: Iterable[UserError]) -> None:
    """Raise the one error, or all of them as :class:`UserErrors`; the same line is said once. No errors: return."""
    flat = [single for error in errors for single in (error.errors if isinstance(error, UserErrors) else [error])]
    distinct = list({str(error): error for error in flat}.values())
    if len(distinct) == 1:
        raise distinct[0]
    if distinct:
        raise UserErrors(distinct)
