"""EPUB 3 and CBZ: books that are zip archives."""

from __future__ import annotations

import datetime
import hashlib
import html
import io
import uuid
import zipfile

from ..errors import StoryError
from ..stories.images import to_pil
from ..stories.page import book_title, language_of
from ..stories.story import Story
from .encode import encode_image
from .fonts import is_right_to_left
from .layout import PageConfig
from .render import render_pages

EPOCH = (1980, 1, 1, 0, 0, 0)  # of every entry: the same story gives the same file
EPUB_SIDE = 1600  # px of an image's longer side; readers show no more

CONTAINER = """<?xml version="1.0" encoding="UTF-8"?>
<container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container">
<rootfiles><rootfile full-path="EPUB/package.opf" media-type="application/oebps-package+xml"/></rootfiles>
</container>
"""
STYLE = """body { margin: 0 5%; font-family: serif; text-align: center; }
figure { margin: 1em 0 0 0; page-break-inside: avoid; }
img { max-width: 100%; max-height: 75vh; }
figcaption, p { font-size: 1.15em; line-height: 1.5; margin: 0.8em 0; }
"""


def render_epub(story: Story, title: str, language: str = "", modified: datetime.datetime | None = None) -> bytes:
    """A story as an EPUB 3 book that reflows: a page for each panel, the text below its image.

    Args:
        language: A tag such as "de"; "" guesses it from the script.
        modified: When it was made; None for now.

    Raises:
        StoryError: For a story without panels.
    """
    title, language = title.strip() or book_title(story), language or language_of(story.text)
    is_rtl, panels = is_right_to_left(story.text), story.panels()
    if not panels:
        raise StoryError("The story is empty; there is no book to make.")
    modified = modified or datetime.datetime.now(datetime.timezone.utc)
    files: dict[str, bytes] = {"EPUB/style.css": STYLE.encode()}
    manifest, spine, points = [], [], []
    for number, panel in enumerate(panels, 1):
        body, paragraphs = "", _paragraphs(panel.text)
        if panel.image is not None:
            data, suffix = encode_image(to_pil(panel.image.display_pixels), EPUB_SIDE)
            name, kind = f"{number:03d}{suffix}", "image/png" if suffix == ".png" else "image/jpeg"
            files[f"EPUB/{name}"] = data
            cover = ' properties="cover-image"' if not any("cover-image" in item for item in manifest) else ""
            manifest.append(f'<item id="image{number}" href="{name}" media-type="{kind}"{cover}/>')
            body = f'<img src="{name}" alt="{_escaped(panel.alt or f"Image {number}")}"/>'
            body = f"<figure>{body}<figcaption>{paragraphs}</figcaption></figure>"
        page = f"page{number:03d}.xhtml"
        files[f"EPUB/{page}"] = _xhtml(title, language, is_rtl, body or f"<section>{paragraphs}</section>")
        manifest.append(f'<item id="page{number}" href="{page}" media-type="application/xhtml+xml"/>')
        spine.append(f'<itemref idref="page{number}"/>')
        points.append(f'<li><a href="{page}">{number}</a></li>')
    points = f'<nav epub:type="toc" id="toc"><h1>{_escaped(title)}</h1><ol>{"".join(points)}</ol></nav>'
    files["EPUB/nav.xhtml"] = _xhtml(title, language, is_rtl, points)
    digest = hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest()
    package = f"""<?xml version="1.0" encoding="UTF-8"?>
<package xmlns="http://www.idpf.org/2007/opf" version="3.0" unique-identifier="id" xml:lang="{language}">
<metadata xmlns:dc="http://purl.org/dc/elements/1.1/">
<dc:identifier id="id">urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, digest)}</dc:identifier>
<dc:title>{_escaped(title)}</dc:title>
<dc:language>{language}</dc:language>
<meta property="dcterms:modified">{modified:%Y-%m-%dT%H:%M:%SZ}</meta>
<meta property="schema:accessMode">textual</meta>
<meta property="schema:accessMode">visual</meta>
<meta property="schema:accessibilityFeature">alternativeText</meta>
</metadata>
<manifest>
<item id="nav" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>
<item id="style" href="style.css" media-type="text/css"/>
{chr(10).join(manifest)}
</manifest>
<spine{' page-progression-direction="rtl"' if is_rtl else ""}>
{chr(10).join(spine)}
</spine>
</package>
"""
    files["EPUB/package.opf"] = package.encode()
    head = {"mimetype": b"application/epub+zip", "META-INF/container.xml": CONTAINER.encode()}
    return _archive({**head, **files}, stored=("mimetype",))


def render_cbz(story: Story, title: str, config: PageConfig, strict: bool = True) -> bytes:
    """The pages of a story as a comic book archive; raises as `lay_out`."""
    files = {}
    for number, page in enumerate(render_pages(story, config, strict), 1):
        data, suffix = encode_image(page, dpi=config.dpi)
        files[f"{number:03d}{suffix}"] = data
    manga = "<Manga>YesAndRightToLeft</Manga>" if is_right_to_left(story.text) else ""
    about = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<ComicInfo><Title>{_escaped(title.strip() or book_title(story))}</Title><PageCount>{len(files)}</PageCount>"
        f"<LanguageISO>{config.language or language_of(story.text)}</LanguageISO>{manga}</ComicInfo>\n"
    )
    return _archive({**files, "ComicInfo.xml": about.encode()}, stored=tuple(files))


def _archive(files: dict[str, bytes], stored: tuple[str, ...] = ()) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in files.items():
            is_packed = name in stored or name.endswith((".png", ".jpg"))
            entry = zipfile.ZipInfo(name, EPOCH)
            archive.writestr(entry, data, zipfile.ZIP_STORED if is_packed else zipfile.ZIP_DEFLATED)
    return file.getvalue()


def _xhtml(title: str, language: str, is_rtl: bool, body: str) -> bytes:
    order = ' dir="rtl"' if is_rtl else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE html>\n'
        '<html xmlns="http://www.w3.org/1999/xhtml" xmlns:epub="http://www.idpf.org/2007/ops" '
        f'xml:lang="{language}" lang="{language}"{order}>\n<head><title>{_escaped(title)}</title>'
        f'<link rel="stylesheet" type="text/css" href="style.css"/></head>\n<body>{body}</body>\n</html>\n'
    ).encode()


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{_escaped(line)}</p>" for line in text.split("\n") if line.strip())


def _escaped(text: str) -> str:
    """Text for XML, which some control characters cannot be in."""
    return html.escape("".join(c for c in text if c in "\t\n" or (c >= " " and c not in "\ufffe\uffff")), quote=True)
