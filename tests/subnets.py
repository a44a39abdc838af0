"""Networks that tests make on the machine, each with addresses of its own."""

import subprocess


def numbered(*command: str) -> int:
    """The number by which the command has made something new: whoever else of the machine calls gets another.

    Args:
        command: has `{}` where the number belongs in a name.
    """
    for number in range(256):
        made = subprocess.run([word.format(number) for word in command], capture_output=True, text=True, check=False)
        if made.returncode == 0:
            return number
        assert "File exists" in made.stderr, made.stderr
    raise AssertionError("every number is taken")
