"""Secrets of a test, looked for wherever they must not be."""

import base64
from collections.abc import Iterable
from pathlib import Path


class Canaries:
    """Secrets by what they are, found in whatever form they are written."""

    def __init__(self, **secrets: str) -> None:
        self._forms: dict[str, list[bytes]] = {}
        for name, secret in secrets.items():
            self.add(name, secret)

    def add(self, name: str, secret: str) -> None:
        assert len(secret) >= 16, "another text might have it by chance"
        raw = secret.encode()
        # Base64 depends on what stands before: cut to what does not, for each place in a group of three bytes.
        encoded = [base64.urlsafe_b64encode(raw[skipped:])[: (len(raw) - skipped) // 3 * 4] for skipped in range(3)]
        forms = [raw, raw.hex().encode(), *encoded, *(one.translate(bytes.maketrans(b"-_", b"+/")) for one in encoded)]
        self._forms.setdefault(name, []).extend(forms)

    def found(self, text: bytes) -> set[str]:
        """What of them is in the text."""
        return {name for name, forms in self._forms.items() if any(form in text for form in forms)}

    def found_in_files(self, files: Iterable[Path]) -> dict[str, set[str]]:
        """What of them is in which files."""
        found = {str(file): self.found(file.read_bytes()) for file in files if file.is_file()}
        return {file: names for file, names in found.items() if names}
