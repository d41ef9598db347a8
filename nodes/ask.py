"""Ask, Caption, Choose: what the LLM sees in pictures."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..comfy_mminterleaved.errors import StoryError
from ..comfy_mminterleaved.generation.text import Sampling
from ..comfy_mminterleaved.stories.story import Story
from .segments import pictures_of, with_features
from .sockets import CATEGORY, EncoderSocket, LLMSocket, StorySocket
from .write import live


class AskStory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedAsk",
            display_name="Ask",
            category=CATEGORY,
            description="Answers a question about the pictures of a story.",
            inputs=[
                LLMSocket.Input("llm", tooltip="Reads the story and answers."),
                StorySocket.Input("story", tooltip="A story with at least one picture."),
                io.String.Input(
                    "question",
                    multiline=True,
                    default="Who is in the picture?",
                    dynamic_prompts=False,
                    tooltip="The starter model knows questions about who, where, what and the weather.",
                ),
                io.Int.Input(
                    "max_tokens", default=20, min=1, max=1024, tooltip="The answer has at most so many tokens."
                ),
            ],
            outputs=[io.String.Output("answer_out", display_name="answer")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, llm, story, question, max_tokens) -> io.NodeOutput:
        if not question.strip():
            raise StoryError("The question is empty; ask something.")
        sampling = Sampling(max_new_tokens=max_tokens, min_new_tokens=1, sample=False, repetition_penalty=1.0)
        llm.load(story, max_tokens + 64)
        llm.read(story)
        answer = llm.model.ask(story, question, sampling, on_token=live(cls.hidden.unique_id, max_tokens)).text
        return io.NodeOutput(answer, ui=ui.PreviewText(answer))


class CaptionPicture(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedCaption",
            display_name="Caption",
            category=CATEGORY,
            description="Says what is in a picture. A batch gives a caption for each.",
            inputs=[
                LLMSocket.Input("llm", tooltip="Writes the caption."),
                EncoderSocket.Input("encoder", tooltip="Sees the picture."),
                io.Image.Input("image", tooltip="The picture, or a batch of pictures."),
                io.Int.Input(
                    "beams",
                    default=5,
                    min=1,
                    max=64,
                    tooltip="The search keeps so many captions at a time; 1 takes the likeliest word always.",
                ),
                io.Int.Input(
                    "max_tokens", default=40, min=1, max=1024, tooltip="A caption has at most so many tokens."
                ),
            ],
            outputs=[io.String.Output("captions_out", display_name="captions", is_output_list=True)],
        )

    @classmethod
    def execute(cls, llm, encoder, image, beams, max_tokens) -> io.NodeOutput:
        sampling = Sampling(
            max_new_tokens=max_tokens, min_new_tokens=1, repetition_penalty=1.0, beams=beams, sample=beams > 1
        )
        captions = []
        for picture in pictures_of(image):
            story = with_features(encoder, Story.of(picture))
            llm.load(story, beams * (max_tokens + 64))
            captions.append(llm.model.caption(story, sampling)[0].text)
        return io.NodeOutput(captions, ui=ui.PreviewText("\n".join(captions)))


class ChooseOption(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MMInterleavedChoose",
            display_name="Choose",
            category=CATEGORY,
            description="Ranks answers by how likely they are, as the story's next text or as answers to a question.",
            inputs=[
                LLMSocket.Input("llm", tooltip="Reads the story and weighs the options."),
                StorySocket.Input("story", tooltip="The story that the options are about."),
                io.String.Input(
                    "options",
                    multiline=True,
                    default="a fox\na bear\na rabbit",
                    dynamic_prompts=False,
                    tooltip="One option a line.",
                ),
                io.String.Input("question", default="", tooltip="A question that the options answer; may be empty."),
            ],
            outputs=[
                io.String.Output("best_out", display_name="best", tooltip="The likeliest option."),
                io.String.Output("options_out", display_name="ranked", is_output_list=True, tooltip="Likeliest first."),
                io.Float.Output(
                    "scores_out",
                    display_name="scores",
                    is_output_list=True,
                    tooltip="The log-probability of each, in the order of 'ranked'.",
                ),
            ],
        )

    @classmethod
    def execute(cls, llm, story, options, question) -> io.NodeOutput:
        lines = [line.strip() for line in options.splitlines() if line.strip()]
        if len(lines) < 2:
            raise StoryError(f"There must be at least two options, one a line, not {len(lines)}.")
        llm.load(story, 64 * len(lines))
        llm.read(story)
        ranked = llm.model.choose(story, lines, question)
        shown = "\n".join(f"{choice.log_probability:8.2f}  {choice.option}" for choice in ranked)
        return io.NodeOutput(
            ranked[0].option, [c.option for c in ranked], [c.log_probability for c in ranked], ui=ui.PreviewText(shown)
        )
