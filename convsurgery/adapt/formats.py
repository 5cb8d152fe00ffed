"""Which image files are opened: formats that are pixels, whatever a file's name says."""

from __future__ import annotations

from typing import Any

__all__ = ["FORMATS", "ImagesOnly"]

#: what image files may be, whatever their names say: PIL would start Ghostscript for a file that is PostScript
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


class ImagesOnly:
    """A timm reader that gives out no file of another format than :data:`FORMATS`; OSError for those."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        file, *rest = self.reader[index]
        Image.open(file, formats=FORMATS)  # reads the head alone
        file.seek(0)
        return (file, *rest)

    def __len__(self) -> int:
        return len(self.reader)

    def __getattr__(self, name: str) -> Any:
        if name == "reader" or name.startswith("__"):  # while it is unpickled there is none yet
            raise AttributeError(name)
        return getattr(self.reader, name)
