"""The layout of instructions and chats as text. Stage 1 and generation share it."""

ANSWERING_ROLE = "assistant"
ROLES = ("system", "user", ANSWERING_ROLE, "tool")
INSTRUCTION_FIELDS = ("Instruction", "Input", "Response")
END_OF_TURN = "\n\n"


def heading(name: str) -> str:
    """Return the line that precedes the text of a field in an instruction record."""
    return f"### {name}:\n"


def heading_of_role(role: str) -> str:
    """Return the line that precedes a message of a chat."""
    return heading(role.capitalize())


def instruction_prompt(instruction: str, given: str = "") -> str:
    """Return the text of an instruction up to the place where the answer begins.

    ``given`` is the input that belongs to the instruction. It may be empty.
    """
    texts = (instruction, given) if given else (instruction,)
    fields = zip(INSTRUCTION_FIELDS, texts, strict=False)
    return "".join(heading(name) + text + END_OF_TURN for name, text in fields) + heading(INSTRUCTION_FIELDS[-1])
