"""What a path may begin with or hold: ~ for the home folder and, in a file, $VARIABLES of the environment."""

import os
import re

VARIABLE = re.compile(r"\$(?:\$|([A-Za-z_]\w*)|\{([^}]*)\})")
NAME = re.compile(r"[A-Za-z_]\w*")


def expand_home(text: str) -> str:
    """A path with the home folder in place of a ~ at its beginning, as a shell has it: `--output_dir=~/out` arrives
    with the ~. Raises ValueError where no home folder is known."""
    path = os.path.expanduser(text)
    if path == "~" or path.startswith("~/"):
        raise ValueError(f"no home folder is known for {text}; set HOME, or write the path in full")
    return path


def expand_variables(text: str) -> str:
    """A path with the values of $NAME and ${NAME} from the environment; $$ is a dollar sign. Raises ValueError with a
    sentence that names a variable that is not set."""

    def value(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        name = found[1] if found[2] is None else found[2]
        if NAME.fullmatch(name) is None:
            raise ValueError(f"{found[0]} in {text} is no variable, which is written ${{NAME}}; $$ is a dollar sign")
        if name not in os.environ:
            raise ValueError(f"the variable {name} in {text} is not set; $$ is a dollar sign")
        return os.environ[name]

    return VARIABLE.sub(value, text)


def without_variables(path: str) -> str:
    """The text that `expand_variables` makes this path of."""
    return VARIABLE.sub(lambda found: found[0].replace("$", "$$"), path)


def expand(text: str) -> str:
    """A path in a file with its variables and its home folder. Raises ValueError."""
    return expand_home(expand_variables(text))
