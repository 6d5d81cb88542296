"""Format sizes, times and names for people."""


def format_size(size: int) -> str:
    """Return a size in bytes as text with a unit, such as ``1.5 GB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size} B"


def format_duration(seconds: float) -> str:
    """Return a number of seconds as text, such as ``3 h 07 min``, ``7 min 30 s`` or ``12.5 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60:,} h {minutes % 60:02} min"


def count_of(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with a noun, such as ``1 rank`` or ``1,024 ranks``. The default plural ends in s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def printable(text: str, *, line_breaks: bool = True) -> str:
    """Replace control characters in a text by escape sequences. If ``line_breaks``, line breaks and tabs remain."""
    kept = "\n\t" if line_breaks else ""
    return "".join(
        c if c in kept or c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )
