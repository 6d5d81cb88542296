"""Define how instructions and chats become text. Stage 1 and generation use the same format."""

ANSWERING_ROLE = "assistant"
ROLES = ("system", "user", ANSWERING_ROLE, "tool")
INSTRUCTION_FIELDS = ("Instruction", "Input", "Response")
END_OF_TURN = "\n\n"


def heading(name: str) -> str:
    """Return the heading line before a field of an instruction, such as ``### Response:``."""
    return f"### {name}:\n"


def heading_of_role(role: str) -> str:
    """Return the heading line before a message of a chat, such as ``### User:``."""
    return heading(role.capitalize())


def instruction_prompt(instruction: str, given: str = "") -> str:
    """Return an instruction as text in the format of the training data, up to the place where the answer begins.

    ``given`` is the input for the instruction, such as a text to translate.
    """
    texts = (instruction, given) if given else (instruction,)
    fields = zip(INSTRUCTION_FIELDS, texts, strict=False)
    return "".join(heading(name) + text + END_OF_TURN for name, text in fields) + heading(INSTRUCTION_FIELDS[-1])
