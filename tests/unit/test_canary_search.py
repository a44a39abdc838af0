"""What looks for secrets finds them in every form."""

import base64

import pytest

from tests.canaries import Canaries

SECRET = "sk-sept-a_b-c_d-e~f~g~h?i?j>k>l"


@pytest.mark.parametrize("before", ["", "a", "ab", "abc"])
def test_a_secret_is_found_as_it_is_in_hexadecimal_and_in_base64(before: str) -> None:
    canaries = Canaries(key=SECRET)
    text = f"{before}{SECRET}, and more".encode()
    forms = (text, text.hex().encode(), base64.b64encode(text), base64.urlsafe_b64encode(text))
    assert [canaries.found(b"so: " + form) for form in forms] == [{"key"}] * 4
    assert canaries.found(b"nothing") == set()
