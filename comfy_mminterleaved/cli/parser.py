"""The parser of the command line."""

import argparse
from collections.abc import Callable

from .. import __version__

DTYPES = ("float32", "float16", "bfloat16")
FORMATS = ("fp8", "int8", "q4_0")  # `models.quantization.FORMATS`, without importing PyTorch
DEFAULT_OUT = "out/story"
DEFAULT_DENOISE = 0.6  # of an initial image: its layout stays, its content can change


class _Segment(argparse.Action):
    """Collects --text and --image in the order given."""

    def __call__(self, parser, namespace, value, option=None):
        namespace.opening = [*(namespace.opening or []), (self.dest, value)]


def _add(group, flag: str, old: str, **options) -> None:
    """Adds a flag that also has an old spelling, which --help does not show."""
    dest = flag[2:].replace("-", "_")
    group.add_argument(flag, dest=dest, **options)
    group.add_argument(old, dest=dest, **{**options, "help": argparse.SUPPRESS})


def make_parser(commands: dict[str, Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
    """The parser; `run` of what it returns is the function of the command in `commands`."""
    parser = argparse.ArgumentParser(prog="mminterleaved", description="Stories of interleaved text and images.")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True)

    def command(name: str, summary: str):
        p = subparsers.add_parser(name, help=summary, description=summary)
        p.set_defaults(run=commands[name])
        p.add_argument("--json", action="store_true", help="print one JSON object on standard output")
        return p

    def model_options(p):
        p.add_argument(
            "--model",
            help="a checkpoint folder; starter: the small model that ships (the default); tiny-random: random weights",
        )
        p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
        p.add_argument(
            "--dtype",
            choices=DTYPES,
            help="of what is computed (default: float16 on CUDA; float32 on CPU, for a large model bfloat16 if the "
            "processor has units for it)",
        )
        p.add_argument(
            "--memory",
            metavar="SIZE",
            help="of the card that may be used, like 12GB: blocks that do not fit together take turns (default: what "
            "is free)",
        )
        p.add_argument("--kv-cache", choices=("fp8",), help="store the LLM's cache in 8 bits: half the memory")
        p.add_argument(
            "--quantize",
            choices=FORMATS[:2],
            help="quantize the LLM while it loads, with torchao; `convert --quantize` does it once for all",
        )
        p.add_argument(
            "--lora",
            metavar="FILE",
            help="a LoRA that `finetune` wrote, added to the model (default: that of --story; '' for none)",
        )
        p.add_argument("--compile", action="store_true", help="torch.compile: slow to start, for many images")
        p.add_argument("--quiet", action="store_true", help="no progress bars")

    def story_options(p, grows=True):
        p.add_argument("--text", action=_Segment, help="text of the story; may be repeated, in order with --image")
        _add(p, "--image", "--picture", action=_Segment, metavar="FILE", help="an image of the story; may be repeated")
        p.add_argument("--story", metavar="FOLDER", help="a story to continue: its folder, or its story.json")
        if grows:
            p.add_argument(
                "--drop-oldest-panels", action="store_true", help="drop the oldest panels if the story is too long"
            )
        p.add_argument("--seed", type=int, help="seed of text and images (default: the story's, else 0)")
        p.set_defaults(opening=None)

    def text_options(p, default="the model's own"):
        group = p.add_argument_group("text generation", f"Defaults: those of --story, else {default}.")
        group.add_argument("--max-new-tokens", type=int)
        group.add_argument("--min-new-tokens", type=int)
        group.add_argument("--greedy", action="store_true", help="no sampling: always the likeliest token")
        group.add_argument("--temperature", type=float)
        group.add_argument("--top-k", type=int, help="0 for all")
        group.add_argument("--top-p", type=float)
        group.add_argument("--repetition-penalty", type=float)
        _add(group, "--num-beams", "--beams", type=int)

    def image_options(p):
        group = p.add_argument_group("image generation", "Defaults: those of --story, else the model's own.")
        group.add_argument("--steps", type=int)
        _add(group, "--guidance-scale", "--guidance", type=float)
        group.add_argument("--scheduler", help="ddpm, ddim, dpm++, euler, unipc, or a class of diffusers")
        group.add_argument("--size", metavar="WxH", help="in px")
        _add(group, "--context-images", "--look-back", type=int, help="how many earlier images the U-Net attends to")
        _add(
            group,
            "--mmfs-scale",
            "--strength",
            type=float,
            help="scale of MMFS in the U-Net; 0 turns it off",
        )
        _add(group, "--mmfs-start", "--start", type=float, help="when MMFS starts, as a fraction of the steps")
        _add(group, "--mmfs-end", "--end", type=float, help="when MMFS ends, as a fraction of the steps")
        group.add_argument(
            "--best-of",
            type=int,
            metavar="N",
            help="draw N candidates for each image and keep the one that fits text and heroes best",
        )
        group.add_argument(
            "--refine",
            action=argparse.BooleanOptionalAction,
            help="give each image a second form of twice the size, for pages; later panels see the first",
        )

    def run_options(p, default=""):
        p.add_argument(
            "--out",
            help="the folder to write; if it holds another story, a free name beside it (default: "
            f"{default}{DEFAULT_OUT})",
        )
        p.add_argument("--overwrite", action="store_true", help="replace the story in --out")
        p.add_argument(
            "--restart",
            action="store_true",
            help="tell all of a storyboard's stories anew; each replaces the old one when it is whole",
        )
        p.add_argument(
            "--retry-failed", action="store_true", help="also tell stories of a storyboard that failed before"
        )

    p = command("tell", "Tells an illustrated story: a folder with story.html, story.json and the images.")
    story_options(p)
    p.add_argument("--storyboard", metavar="FILE", help="a file of stories to tell; each gets a folder of its own")
    p.add_argument("--panels", type=int, help="how many panels to add (default: 3)")
    image_first = {"dest": "image_first", "action": argparse.BooleanOptionalAction}
    p.add_argument(
        "--image-first", **image_first, help="each panel's image before its text (default: as the story or the model)"
    )
    p.add_argument("--picture-first", **{**image_first, "help": argparse.SUPPRESS})
    p.add_argument(
        "--introduce",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="add a sentence that says who is in an opening image, if the model's stories have one",
    )
    p.add_argument(
        "--redraw",
        type=int,
        metavar="PANEL",
        help="draw one panel of --story anew, from 1, with --seed (default: its own plus 1); the others stay",
    )
    p.add_argument("--title")
    run_options(p, "that of --story, else ")
    p.add_argument(
        "--batch",
        default="1",
        metavar="N",
        help="how many stories of a storyboard share passes of LLM and U-Net: faster, but a pixel's last bit, or now "
        "and then a word, can differ from a story told alone; auto: as many as fit the free memory (default: 1)",
    )
    p.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="tell a storyboard's stories on Ray (`pip install ray`): on this computer, or on the cluster at ADDRESS",
    )
    p.add_argument(
        "--workers", type=int, metavar="N", help="of Ray (default: one per GPU; without any, one per four CPU cores)"
    )
    text_options(p), image_options(p), model_options(p)

    p = command("queue", "Has running ComfyUI servers tell a storyboard's stories with any workflow.")
    p.add_argument("workflow", help="a workflow with a Load Storyboard, saved with Export (API), or a template")
    p.add_argument(
        "--storyboard", metavar="FILE", required=True, help="the stories; sent to the servers with its images"
    )
    p.add_argument(
        "--server",
        metavar="URL",
        action="append",
        required=True,
        help="a server, like http://127.0.0.1:8188; may be repeated, and each is kept busy",
    )
    run_options(p)

    p = command("write", "Continues a story with text.")
    story_options(p), text_options(p), model_options(p)
    p.add_argument("--count", type=int, default=1, help="how many texts")

    p = command("draw", "Draws the next image of a story.")
    story_options(p), image_options(p), model_options(p)
    p.add_argument("--count", type=int, default=1, help="how many images; the k-th has seed + k")
    _add(p, "--init-image", "--begin", metavar="FILE", help="an image to start from")
    p.add_argument(
        "--denoise", type=float, help=f"how much of --init-image changes, up to 1 (default: {DEFAULT_DENOISE})"
    )
    p.add_argument("--out", default="out/image.png", help="the PNG to write (default: %(default)s)")

    p = command("ask", "Answers a question about the images of a story.")
    p.add_argument("question")
    story_options(p, grows=False)
    text_options(p, "the likeliest words, 30 at most"), model_options(p)
    p.add_argument("--option", action="append", help="rank given answers instead of writing one; may be repeated")

    p = command("caption", "Describes an image.")
    story_options(p, grows=False)
    text_options(p, "five beams, 30 tokens at most"), model_options(p)
    p.add_argument("--count", type=int, default=1, help="how many captions")

    p = command("export", "Writes a saved story as a book: PDF, EPUB, CBZ or HTML, or as a folder to give away.")
    p.add_argument("book", help="the story's folder, or its story.json")
    p.add_argument("out", nargs="+", help="files to write, like mia.pdf or mia.epub; a name without suffix is a folder")
    p.add_argument("--title", help="(default: the story's)")
    p.add_argument("--overwrite", action="store_true", help="replace files that exist")
    p.add_argument(
        "--no-metadata",
        action="store_true",
        help="leave texts and settings out of a folder's images; its story.json keeps them",
    )
    p.add_argument(
        "--language", metavar="TAG", help="of the texts, like de or pt-BR (default: guessed from the script)"
    )
    group = p.add_argument_group("pages", "Of PDF and CBZ; HTML and EPUB reflow.")
    group.add_argument(
        "--layout",
        help="picture book, 2 panels, 3 panels, 4 panels, 6 panels, or cells: rows divided by '/', as in "
        "'2: 1 / 1: 1 1' (default: picture book)",
    )
    group.add_argument(
        "--page-size",
        help="A4, A5, A6, letter, square, comic, also 'A5 landscape', or like '210 x 148 mm' (default: A5)",
    )
    group.add_argument(
        "--captions",
        choices=("beneath", "box", "none"),
        help="beneath the image, in a box at its foot, or none (default: beneath)",
    )
    group.add_argument("--fit", choices=("whole", "crop"), help="show whole images, or fill the cells (default: whole)")
    group.add_argument("--order", help="which panel goes into which cell, like '1, 3, 2'; 0 leaves one empty")
    group.add_argument("--margin", type=float, metavar="MM", help="around the page (default: 10)")
    group.add_argument("--gutter", type=float, metavar="MM", help="between cells (default: 4)")
    group.add_argument("--font", metavar="FILE", help="(default: one that has the text's signs)")
    group.add_argument(
        "--font-size", type=float, metavar="PT", help="long captions are set smaller (default: one for the layout)"
    )
    group.add_argument("--dpi", type=int, help="of CBZ's pages, and the most of a PDF's images (default: 300)")

    p = command("finetune", "Trains a LoRA on stories of your own, for --lora and for ComfyUI (`pip install peft`).")
    p.add_argument(
        "stories",
        nargs="+",
        help="folders of saved stories, folders of such folders, or storyboards, whose openings are learned",
    )
    p.add_argument("--out", required=True, metavar="FILE", help="the .safetensors file to write; a stopped run goes on")
    group = p.add_argument_group("training")
    group.add_argument("--steps", type=int, help="(default: 1000)")
    group.add_argument("--batch", type=int, metavar="N", help="panels per step (default: 4)")
    group.add_argument("--learning-rate", type=float, help="(default: 0.0005)")
    group.add_argument("--rank", type=int, help="of the LoRA (default: 4)")
    group.add_argument(
        "--reconstruction",
        type=float,
        metavar="WEIGHT",
        help="how much reading and drawing correct each other; 0 turns it off (default: 1)",
    )
    group.add_argument("--only", choices=("llm", "unet"), help="train one block (default: both)")
    group.add_argument("--seed", type=int, help="(default: 0)")
    p.add_argument("--model", default="starter", help="a checkpoint folder (default: starter)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    p.add_argument(
        "--dtype", choices=DTYPES, help="of what is computed (default: bfloat16 on CUDA, float32 on the CPU)"
    )
    p.add_argument("--quiet", action="store_true", help="no progress bar")

    p = command("convert", "Converts a checkpoint between the reference's layout and this project's.")
    p.add_argument("source", help="a checkpoint folder, starter or tiny-random")
    p.add_argument("target", help="a new folder")
    p.add_argument("--to", choices=("native", "reference", "own"), default="native", metavar="{native,reference}")
    p.add_argument("--dtype", choices=DTYPES, help="of the weights written (default: as they are)")
    p.add_argument(
        "--quantize",
        choices=FORMATS,
        help="store the LLM's attention and MLP in 8 bits, or in 4 (q4_0, which needs `pip install gguf`); what else "
        "is in float32 is written in float16",
    )
    p.add_argument("--quiet", action="store_true", help="no progress bar")

    p = command("info", "Shows what a checkpoint contains.")
    p.add_argument("source", help="a checkpoint folder, starter or tiny-random")
    p.add_argument(
        "--memory", metavar="SIZE", help="plan it on a card of this size, like 12GB; exit code 2 if it does not fit"
    )
    p.add_argument("--kv-cache", choices=("fp8",), help="plan with the LLM's cache in 8 bits")
    return parser
