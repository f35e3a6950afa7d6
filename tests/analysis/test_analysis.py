import csv

import numpy as np
import pytest
import torch
from laws import randomise
from PIL import Image
from torch import nn

from mmrep.analysis import (
    BranchReport,
    analyze_branches,
    draw_branch_kernels,
    draw_kernels,
    draw_shares,
    pictures,
    write_table,
)
from mmrep.models.blocks import DiverseBranchBlock, MobileOneBlock, RepVGGBlock
from mmrep.reparam import NotFoldableError


def report(name: str = 'a', **changes) -> BranchReport:
    fields = dict(
        geometry='4 -> 4, 3x3',
        shares={'branch_3x3': 0.75, 'branch_1x1': 0.25},
        cancelled=0.1,
        largest=0.5,
        peak=4.0,
        channels=2.0,
        skeleton=torch.rand(3, 3),
    )
    return BranchReport(name, **{**fields, **changes})


class TestAnalyzeBranches:
    def test_by_hand(self):
        """A 3x3 kernel of 3 everywhere, and -4 in its middle by the 1x1 branch."""
        block = RepVGGBlock(1, 2, norm_cfg=dict(type='BN', eps=0.0)).eval()
        nn.init.constant_(block.branch_3x3.conv.weight, 3.0)
        nn.init.constant_(block.branch_1x1.conv.weight, -4.0)
        # The second channel counts a third.
        with torch.no_grad():
            for branch in (block.branch_3x3, block.branch_1x1):
                branch.norm.weight.copy_(torch.tensor([1.0, 1 / 3]))
        (found,) = analyze_branches(nn.Sequential(block))
        assert (found.name, found.geometry) == ('0', '1 -> 2, 3x3')
        # |W|: nine 3s and one 4.
        assert found.shares == pytest.approx({'branch_3x3': 9 / 13, 'branch_1x1': 4 / 13})
        channels = (1 + 1 / 9) ** 0.5
        whole = (8 * 9 + 1) ** 0.5 * channels
        assert found.cancelled == pytest.approx(1 - whole / (13 * channels))
        assert found.largest == pytest.approx(3)
        assert found.peak == pytest.approx(3 / (whole / 18**0.5))
        # The lower of two is torch's median.
        assert found.channels == pytest.approx(3)
        expected = torch.full((3, 3), 2.0, dtype=torch.float64)
        expected[1, 1] = 2 / 3
        torch.testing.assert_close(found.skeleton, expected)

    def test_every_block_in_its_order(self):
        model = nn.Sequential(
            randomise(DiverseBranchBlock(4, 4, 3, groups=4)),
            nn.ReLU(),
            randomise(MobileOneBlock(4, 6, (1, 3), 2)),
        )
        first, second = analyze_branches(model)
        assert (first.name, first.geometry) == ('0', '4 -> 4, 3x3, 4 groups')
        assert (second.name, second.geometry) == ('2', '4 -> 6, 1x3')
        for each, block in ((first, model[0]), (second, model[2])):
            assert each.shares.keys() == block.branches().keys()
            assert sum(each.shares.values()) == pytest.approx(1)
            assert 0 <= each.cancelled < 1 < each.peak
            assert each.skeleton.shape == block.kernel_size
        # Of the mode nothing depends, nor is it changed.
        assert model.training

    def test_of_zeros(self):
        block = RepVGGBlock(2, 2)
        for parameter in block.parameters():
            nn.init.zeros_(parameter)
        (found,) = analyze_branches(block)
        assert set(found.shares.values()) == {0.0}
        assert (found.largest, found.peak, found.channels) == (0, 0, 0)

    def test_without_blocks(self):
        deployed = RepVGGBlock(2, 2, deploy=True)
        with pytest.raises(ValueError, match='no block in train form'):
            analyze_branches(nn.Sequential(nn.Conv2d(2, 2, 3), deployed))

    def test_what_is_no_conv_is_named(self):
        model = nn.Sequential(RepVGGBlock(2, 2, norm_cfg=dict(type='GN', num_groups=1)))
        with pytest.raises(NotFoldableError, match=r'^0\.branch_3x3'):
            analyze_branches(model)


def test_table(tmp_path):
    write_table(
        [report(), report('b, "c"', shares={'branch_avg': 1.0})], tmp_path / 'a.csv'
    )
    with open(tmp_path / 'a.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(row['block'], row['branch'], float(row['share'])) for row in rows] == [
        ('a', 'branch_3x3', 0.75),
        ('a', 'branch_1x1', 0.25),
        ('b, "c"', 'branch_avg', 1.0),
    ]
    numbers = dict(cancelled=0.1, largest=0.5, peak=4.0, channels=2.0)
    assert {name: float(rows[2][name]) for name in numbers} == numbers


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == 'PNG'
        return np.asarray(image.convert('RGB'))


class TestPictures:
    @pytest.mark.parametrize('draw', [draw_shares, draw_kernels])
    @pytest.mark.parametrize('count', [1, 7, pytest.param(200, marks=pytest.mark.long)])
    def test_of_so_many_blocks(self, tmp_path, draw, count):
        """Whatever its name ends in; a picture of hundreds is no longer than one of 60."""
        reports = [report(f'stage.{index}') for index in range(count)]
        draw(reports, tmp_path / 'a.tmp')
        picture = pixels(tmp_path / 'a.tmp')
        assert picture.std() > 5
        assert 150 < picture.shape[0] < 3500 and 300 < picture.shape[1] < 1700

    def test_shares_are_areas(self, tmp_path):
        """Three quarters are drawn thrice as large as one."""
        draw_shares([report()], tmp_path / 'a.png')
        picture = pixels(tmp_path / 'a.png')
        bars = picture[: picture.shape[0] // 2 + 1]
        blue, orange = (
            (bars == color).all(-1).sum() for color in ((31, 119, 180), (255, 127, 14))
        )
        assert blue / orange == pytest.approx(3, rel=0.1)

    def test_kernels_of_several_sizes(self, tmp_path):
        sizes = [(1, 3), (3, 3), (13, 13), (3, 3)]
        reports = [report(str(size), skeleton=torch.rand(size)) for size in sizes]
        draw_kernels(reports, tmp_path / 'a.png')
        assert pixels(tmp_path / 'a.png').std() > 5

    def test_kernels_of_branches(self, tmp_path, monkeypatch):
        """In one scale: the sum of a 3x3 kernel of 2, a 1x1 of -4 and the identity."""
        tiles = {}
        draw_tiles = pictures._draw_tiles
        monkeypatch.setattr(
            pictures,
            '_draw_tiles',
            lambda named, *rest: (tiles.update(named), draw_tiles(named, *rest)),
        )
        block = RepVGGBlock(1, 1, norm_cfg=dict(type='BN', eps=0.0)).eval()
        nn.init.constant_(block.branch_3x3.conv.weight, 2.0)
        nn.init.constant_(block.branch_1x1.conv.weight, -4.0)
        draw_branch_kernels(block, tmp_path / 'a.png')
        assert list(tiles) == ['branch_3x3', 'branch_1x1', 'branch_norm', 'sum']
        middles = {name: kernel[1, 1].item() for name, kernel in tiles.items()}
        assert middles == dict(branch_3x3=0.5, branch_1x1=1, branch_norm=0.25, sum=0.25)
        assert tiles['sum'][0, 0] == 0.5 and tiles['branch_1x1'][0, 0] == 0
        assert pixels(tmp_path / 'a.png').std() > 5

    def test_kernels_of_zeros(self, tmp_path):
        draw_kernels([report(skeleton=torch.zeros(3, 3))], tmp_path / 'a.png')
