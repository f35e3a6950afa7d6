"""A visualizer's backend that writes each picture into one folder."""

from pathlib import Path
from typing import Any

import numpy as np
from mmcv.image import imwrite
from mmengine.visualization.vis_backend import BaseVisBackend

from mmrep.registry import VISBACKENDS


@VISBACKENDS.register_module()
class PictureFolder(BaseVisBackend):
    """Write pictures as ``save_dir/NAME.png``, those of a repeated name with a number.

    For test sets with a folder for each class, in which file names repeat.

    Args:
        save_dir (str): The folder; it is made with the first picture.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__(save_dir)
        self._taken: set[str] = set()

    def _init_env(self) -> None:
        """Nothing to prepare: the folder is made with the first picture."""

    @property
    def experiment(self) -> 'PictureFolder':
        """This backend."""
        return self

    def add_image(self, name: str, image: np.ndarray, step: int = 0, **_: Any) -> None:
        """Write a picture.

        Args:
            name (str): Its name, in which the ending of an image file is left out.
            image (np.ndarray): The picture ``(H, W, 3)`` in RGB.
            step (int): Not used: there is one test.
        """
        stem = unique = Path(name).stem
        count = 1
        while unique in self._taken:
            count += 1
            unique = f'{stem}_{count}'
        self._taken.add(unique)
        path = Path(self._save_dir, f'{unique}.png')
        imwrite(np.ascontiguousarray(image[..., ::-1]), str(path))
