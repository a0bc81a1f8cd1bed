import io

import numpy as np
import torch
from PIL import Image

from infusion.sampling.pictures import Numbered, captioned_grid, heat, png


def test_png_holds_the_pixels_and_the_text():
    image = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    with Image.open(io.BytesIO(png(image, {"prompt": "a “{}” – naïve", "seed": 7, "scale": 7.5}))) as read:
        assert read.text == {"prompt": "a “{}” – naïve", "seed": "7", "scale": "7.5"}
        assert np.abs(np.asarray(read) / 255 - image.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6


def test_numbering_goes_on_and_overwrites_nothing(tmp_path):
    folder = tmp_path / "new" / "samples"
    first = Numbered(folder)
    assert first.write(b"a").name == "00000.png" and first.write(b"b").name == "00001.png"
    (folder / "00041.png").write_bytes(b"mine")
    (folder / "note-00099.png").write_bytes(b"")
    second = Numbered(folder)
    (folder / "00042.png").write_bytes(b"another run's")
    assert second.write(b"c").name == "00043.png"
    assert (folder / "00042.png").read_bytes() == b"another run's"
    assert Numbered(folder, "note-", digits=4).write(b"d").name == "note-0100.png"


def test_grid_has_every_image_in_its_place():
    red, green, blue = torch.eye(3)[:, :, None, None].expand(3, 3, 8, 8)
    sheet = captioned_grid({"base": [red, green], "ours": [green, blue]}, ["one", "two"], {"photos": [blue]}, 16, gap=4)
    half = captioned_grid({"base": [None, green]}, ["one", "two"], side=16, gap=4)
    assert np.asarray(half)[-12, [-28, -12]].tolist() == [[255, 255, 255], [0, 255, 0]]
    pixels = np.asarray(sheet)
    left = sheet.width - 2 * 20
    bottom = sheet.height - 4

    def cell(row: int, column: int) -> list[int]:  # rows are counted from below
        return pixels[bottom - 12 - 20 * row, left + 8 + 20 * column].tolist()

    assert [cell(1, 0), cell(1, 1)] == [[255, 0, 0], [0, 255, 0]]
    assert [cell(0, 0), cell(0, 1)] == [[0, 255, 0], [0, 0, 255]]
    assert pixels[4 + 8, left + 8].tolist() == [0, 0, 255]
    assert pixels[4 + 8, left + 28].tolist() == [255, 255, 255]


def test_heat_is_brightest_where_the_attention_is():
    attention = torch.zeros(4, 4)
    attention[0, 3] = 2.0
    picture = heat(torch.full((3, 16, 16), 0.5), attention)
    assert picture.shape == (3, 16, 16) and picture.min() >= 0 and picture.max() <= 1
    light = picture.mean(0)
    assert divmod(int(light.argmax()), 16) in {(y, x) for y in range(4) for x in range(12, 16)}
    assert light[12:, :4].max() < 0.25 < light.max()
    assert torch.isfinite(heat(torch.zeros(3, 8, 8), torch.zeros(2, 2))).all()
