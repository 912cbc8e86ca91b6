"""How a folder of pictures is read: a part of the settings, which must not import torch."""

from __future__ import annotations

from dataclasses import dataclass

TAG_ORDERS = 8


@dataclass(frozen=True)
class FolderOptions:
    """How a folder of pictures and its captions are read.

    Args:
        nested_folders: search sub-folders, too. Pictures that the metadata name there belong to it in any case.
        caption_column: the column of the metadata with the captions.
        caption_prefix: put before every caption of a picture, with a space; not before the folder's own prompt.
        shuffle_tags: take the comma-separated tags of captions in other orders.
        keep_tags: so many tags at the start keep their places.
        tag_orders: at most so many orders of each caption.
        seed: of the orders.
    """

    nested_folders: bool = False
    caption_column: str = "text"
    caption_prefix: str = ""
    shuffle_tags: bool = False
    keep_tags: int = 0
    tag_orders: int = TAG_ORDERS
    seed: int = 0


DEFAULTS = FolderOptions()
