"""Why a site leaves its run, and which part of that others may see."""

from __future__ import annotations

from dataclasses import dataclass

_WITHHELD_REASON = "it left; the reason stays in this site's own log"


@dataclass(frozen=True)
class LeaveReason:
    """Why a site leaves its run: the whole text, and the part of it that holds nothing of the site's data.

    Attributes:
        text: The whole reason. It may quote data, as the text of an exception does.
        public: What may leave the site whatever its policy says.
        error: The exception that is the reason, or None.
    """

    text: str
    public: str = _WITHHELD_REASON
    error: BaseException | None = None

    @classmethod
    def own(cls, sentence: str) -> LeaveReason:
        """Return a reason that may leave every site.

        Args:
            sentence: A sentence of fl-adapters or of an adapter, without any value of the user's.

        Returns:
            The reason.
        """
        return cls(sentence, sentence)

    @classmethod
    def of(cls, reason: str | BaseException | LeaveReason) -> LeaveReason:
        """Return a reason in this form.

        Args:
            reason: A reason; an exception, of which the name of its class is public; or a text, of which nothing is.

        Returns:
            The reason.
        """
        if isinstance(reason, LeaveReason):
            return reason
        if isinstance(reason, BaseException):
            kind = type(reason).__name__
            return cls(f"{kind}: {reason}", f"{kind} (its text stays in this site's own log)", reason)
        return cls(reason)
