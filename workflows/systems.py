"""The templates of what stands beside the story model: scoring, masks of words, looking inside, reconstruction."""

from __future__ import annotations

BLUE, GREEN, PURPLE, BROWN = "#3f789e", "#8A8", "#a1309b", "#b58b2a"
TELL, TELL_ROOM = (400, 480), 1600
PAIR = (
    "Mia is a fox in a red coat with a crown. Otto is a bear in a blue coat with a scarf. "
    "Mia and Otto jump on the beach with a ball."
)
BLOCKS = ("encoder", "llm", "synchronizer", "model", "vae")
CAPTION = "A fox in a green coat with a scarf waves in the village with an umbrella. It rains."


def load(w):
    return w.add("MMInterleavedLoad", 0, 0, (300, 170))


def compare(w, model, x: int = 0, y: int = 290):
    return w.add("MMInterleavedLoadContrastive", x, y, (300, 110), model="starter", encoder=model[0])


def blocks(model) -> dict:
    return {name: model[output] for output, name in enumerate(BLOCKS)}


def tell(w, model, x: int, **inputs):
    return w.add("MMInterleavedTellStory", x, 0, TELL, room=TELL_ROOM, **blocks(model), **inputs)


def save(w, story, x: int, **inputs):
    node = w.add("MMInterleavedSaveStory", x, 0, (420, 760), story=story, **inputs)
    node.is_collapsed = True
    return node


def best_of_four(w) -> None:
    w.note(0, -380, (760, 240), "Best of four")
    model = load(w)
    scorer = compare(w, model)
    refiner = w.add("MMInterleavedLoadRefiner", 0, 490, (300, 80), model="starter")
    told = tell(w, model, 420, opening=PAIR, panels=4, seed=21, best_of=4, contrastive=scorer[0], refiner=refiner[0])
    pages = save(w, told[0], 920, title="Mia and Otto")
    w.bend_below(scorer, "encoder", model)
    w.group("1. Model, and what compares", BLUE, model, scorer, refiner)
    w.group("2. The story, each panel four times", PURPLE, told)
    w.group("3. Its pages", GREEN, pages)


def drafts(w) -> None:
    w.note(0, -420, (820, 280), "Drafts")
    model = load(w)
    scorer = compare(w, model)
    tokens = w.add("MMInterleavedLoadImageTokens", 0, 490, (300, 80), model="starter")
    opening = w.add(
        "MMInterleavedStoryText",
        420,
        0,
        (340, 180),
        text="Mia is a fox in a red coat with a crown. Mia jumps on the beach with a ball.",
    )
    ready = w.add(
        "MMInterleavedSynchronize",
        420,
        290,
        (340, 340),
        llm=model[1],
        synchronizer=model[2],
        model=model[3],
        story=opening[0],
    )
    drafted = w.add(
        "MMInterleavedDraftImages",
        860,
        0,
        (340, 360),
        image_tokens=tokens[0],
        positive=ready[1],
        story=opening[0],
        count=8,
        seed=1,
    )
    decoded = w.add("VAEDecode", 860, 470, (340, 80), samples=drafted[0], vae=model[4])
    sheet = w.add("SaveImage", 1300, 0, (420, 520), images=decoded[0], filename_prefix="stories/drafts")
    best = w.add(
        "MMInterleavedBestPanel",
        1300,
        640,
        (420, 180),
        contrastive=scorer[0],
        story=opening[0],
        images=decoded[0],
    )
    begun = w.add("VAEEncode", 1820, 0, (320, 80), pixels=best[0], vae=model[4])
    finished = sample(w, ready, begun, model, 1820, 190, seed=1, denoise=0.6)
    saved = w.add("SaveImage", 2240, 0, (380, 440), images=finished[1][0], filename_prefix="stories/finished")
    w.bend_below(scorer, "encoder", model)
    w.group("1. Models", BLUE, model, tokens, scorer)
    w.group("2. Eight drafts", BROWN, opening, ready, drafted, decoded)
    w.group("3. The one that fits best", GREEN, sheet, best)
    w.group("4. Finished by diffusion", PURPLE, begun, *finished)
    w.group("5. The panel", GREEN, saved)


def find_an_image(w) -> None:
    w.note(0, -380, (760, 240), "Find an image")
    model = load(w)
    scorer = compare(w, model)
    told = tell(
        w,
        model,
        420,
        opening="Mia is a fox in a red coat with a crown. Mia jumps on the beach with a ball.",
        panels=6,
        seed=3,
    )
    result = w.add(
        "MMInterleavedFindImage",
        920,
        0,
        (360, 260),
        room=480,
        contrastive=scorer[0],
        story=told[0],
        text="A fox in a red coat with a crown waves in the meadow with a ball.",
        count=2,
    )
    saved = w.add("SaveImage", 1380, 0, (360, 420), images=result[0], filename_prefix="stories/result")
    w.bend_below(scorer, "encoder", model)
    w.group("1. Model, and what compares", BLUE, model, scorer)
    w.group("2. A story to look through", PURPLE, told)
    w.group("3. What to look for", BROWN, result)
    w.group("4. The two that fit best", GREEN, saved)


def redraw_one_thing(w) -> None:
    w.note(0, -400, (820, 260), "Redraw one thing")
    model = load(w)
    scorer = compare(w, model)
    picture = w.add("MMInterleavedExampleImage", 0, 520, (300, 360))
    image = w.add(
        "ImageScale", 0, 970, (300, 170), image=picture[0], upscale_method="area", width=128, height=128, crop="center"
    )
    mask = w.add(
        "MMInterleavedWordMask",
        420,
        0,
        (360, 560),
        room=860,
        contrastive=scorer[0],
        image=image[0],
        text=CAPTION,
        word="umbrella",
        grow=4,
    )
    story = w.add(
        "MMInterleavedStoryText",
        420,
        980,
        (360, 180),
        text="Mia is a fox in a green coat with a scarf. Mia waves in the village with a guitar. It rains.",
    )
    ready = w.add(
        "MMInterleavedSynchronize",
        880,
        0,
        (320, 320),
        llm=model[1],
        synchronizer=model[2],
        model=model[3],
        story=story[0],
    )
    latent = w.add("VAEEncode", 880, 440, (320, 80), pixels=image[0], vae=model[4])
    masked = w.add("SetLatentNoiseMask", 880, 620, (320, 80), samples=latent[0], mask=mask[0])
    drawn = w.add(
        "KSampler",
        1300,
        0,
        (320, 540),
        model=ready[0],
        positive=ready[1],
        negative=ready[2],
        latent_image=masked[0],
        seed=1,
        steps=20,
        cfg=4.0,
        sampler_name="dpmpp_2m",
        scheduler="karras",
    )
    decoded = w.add("VAEDecode", 1300, 640, (320, 80), samples=drawn[0], vae=model[4])
    saved = w.add("SaveImage", 1720, 0, (380, 460), images=decoded[0], filename_prefix="stories/redrawn")
    w.bend_below(scorer, "encoder", model)
    w.bend_below(image, "image", picture)
    w.group("1. Model and picture", BLUE, model, scorer, picture, image)
    w.group("2. Where the umbrella is", BROWN, mask)
    w.group("3. What is to be there", PURPLE, story)
    w.group("4. Draw only that", PURPLE, ready, latent, masked, drawn, decoded)
    w.group("5. The picture", GREEN, saved)


def ideas_and_variations(w) -> None:
    w.note(0, -420, (820, 280), "Ideas and variations")
    model = load(w)
    prior = w.add("MMInterleavedLoadPrior", 0, 290, (300, 80), model="starter")
    idea = w.add(
        "MMInterleavedTextToImageEmbedding",
        420,
        0,
        (340, 320),
        prior=prior[0],
        text="A fox waves on the beach.",
        count=4,
    )
    ideas = draw_embedding(w, model, prior, idea, 860, 0, 4, "ideas", seed=1)
    scorer = compare(w, model, 0, 790)
    picture = w.add("MMInterleavedExampleImage", 0, 980, (300, 360))
    embedded = w.add("MMInterleavedEmbedImage", 420, 790, (340, 90), contrastive=scorer[0], image=picture[0])
    moved = w.add(
        "MMInterleavedMoveEmbedding",
        420,
        990,
        (340, 320),
        prior=prior[0],
        embedding=embedded[0],
        text=CAPTION.replace("It rains.", "It is night."),
        neutral=CAPTION,
    )
    story = w.add("MMInterleavedStoryPicture", 420, 1420, (340, 190), encoder=model[0], image=picture[0])
    night = draw_embedding(w, model, prior, moved, 860, 790, 2, "night", seed=1, story=story[0])
    w.bend_below(scorer, "encoder", model)
    w.group("1. Model and prior", BLUE, model, prior)
    w.group("2. What the text leaves open", BROWN, idea)
    w.group("3. Four ideas", GREEN, *ideas)
    w.group("4. A picture", BLUE, scorer, picture)
    w.group("5. The same, but at night", BROWN, embedded, moved, story)
    w.group("6. Two variations", GREEN, *night)


def draw_embedding(w, model, prior, embedding, x: int, y: int, count: int, name: str, seed: int, **inputs):
    """The nodes that draw `count` images of image embeddings."""
    ready = w.add(
        "MMInterleavedApplyImageEmbedding",
        x,
        y,
        (320, 200),
        prior=prior[0],
        synchronizer=model[2],
        model=model[3],
        embedding=embedding[0],
        **inputs,
    )
    latent = w.add("EmptyLatentImage", x, y + 300, (320, 140), width=128, height=128, batch_size=count)
    drawn, decoded = sample(w, ready, latent, model, x + 420, y, seed)
    saved = w.add("SaveImage", x + 840, y, (420, 480), images=decoded[0], filename_prefix=f"stories/{name}")
    return ready, latent, drawn, decoded, saved


def look_inside(w) -> None:
    w.note(0, -400, (820, 260), "Look inside")
    model = load(w)
    image = w.add("MMInterleavedExampleImage", 0, 290, (300, 360))
    told = w.add(
        "MMInterleavedStoryText", 420, 0, (340, 160), text="Mia waves in the village with an umbrella. It rains."
    )
    shown = w.add("MMInterleavedStoryPicture", 420, 290, (340, 190), story=told[0], encoder=model[0], image=image[0])
    panel = w.add(
        "MMInterleavedStoryText", 420, 580, (340, 160), story=shown[0], text="Mia sits by the lake with a kite."
    )
    seen = w.add("MMInterleavedLookInside", 880, 0, (400, 620), room=1100, story=panel[0], **blocks(model), seed=2)
    saved = w.add("SaveImage", 1380, 0, (460, 560), images=seen[0], filename_prefix="stories/inside")
    w.bend_below(shown, "story", told)
    w.bend_below(panel, "story", shown)
    w.group("1. Model and picture", BLUE, model, image)
    w.group("2. The story, up to a panel's text", BROWN, told, shown, panel)
    w.group("3. Look inside of that panel", PURPLE, seen)
    w.group("4. With and without the picture", GREEN, saved)


def round_trip(w) -> None:
    w.note(0, -380, (760, 240), "Round trip")
    model = load(w)
    told = tell(
        w,
        model,
        420,
        opening="Mia is a fox in a red coat with a crown. Mia jumps on the beach with a ball.",
        panels=4,
        seed=3,
    )
    again = w.add("MMInterleavedRoundTrip", 920, 0, (400, 420), room=1100, story=told[0], **blocks(model), seed=9)
    pages = save(w, again[0], 1420, title="Mia, told from her pictures")
    w.group("1. Model", BLUE, model)
    w.group("2. The story", PURPLE, told)
    w.group("3. Told again from its pictures", BROWN, again)
    w.group("4. Its pages", GREEN, pages)


def sound_over_a_panel(w) -> None:
    w.note(0, -420, (820, 280), "Sound over a panel")
    model = load(w)
    scorer = compare(w, model)
    prior = w.add("MMInterleavedLoadPrior", 0, 490, (300, 80), model="starter")
    hearing = w.add("MMInterleavedLoadSound", 0, 670, (300, 130), model="starter")
    picture = w.add("MMInterleavedExampleImage", 420, 0, (320, 360))
    audio = w.add("MMInterleavedExampleSound", 420, 460, (320, 80), sound="night")
    heard = w.add("MMInterleavedDescribeSound", 420, 640, (320, 240), room=360, sound_model=hearing[0], audio=audio[0])
    over = w.add(
        "MMInterleavedSoundOverPanel",
        860,
        0,
        (340, 620),
        room=700,
        image=picture[0],
        audio=audio[0],
        sound_model=hearing[0],
        contrastive=scorer[0],
        prior=prior[0],
        encoder=model[0],
        synchronizer=model[2],
        model=model[3],
        vae=model[4],
        seed=1,
    )
    saved = w.add("SaveImage", 1300, 0, (380, 440), images=over[0], filename_prefix="stories/sound")
    w.bend_below(scorer, "encoder", model)
    w.group("1. Model, and what hears", BLUE, model, scorer, prior, hearing)
    w.group("2. A picture and a sound", BROWN, picture, audio, heard)
    w.group("3. The sound over the picture", PURPLE, over)
    w.group("4. The picture", GREEN, saved)


def twice_the_size(w) -> None:
    w.note(0, -380, (760, 240), "Twice the size")
    model = load(w)
    refiner = w.add("MMInterleavedLoadRefiner", 0, 290, (300, 80), model="starter")
    told = tell(
        w,
        model,
        420,
        opening="Mia is a fox in a red coat with a crown. Mia jumps on the beach with a ball.",
        panels=4,
        seed=3,
        refiner=refiner[0],
    )
    pages = save(w, told[0], 920, title="Mia, in large")
    picture = w.add("MMInterleavedExampleImage", 0, 480, (300, 360))
    small = w.add(
        "ImageScale", 0, 930, (300, 170), image=picture[0], upscale_method="area", width=128, height=128, crop="center"
    )
    large = w.add("MMInterleavedRefine", 0, 1230, (300, 120), refiner=refiner[0], image=small[0])
    saved = w.add("SaveImage", 0, 1440, (300, 380), images=large[0], filename_prefix="stories/large")
    w.group("1. Model and refiner", BLUE, model, refiner)
    w.group("2. The story", PURPLE, told)
    w.group("3. Its pages", GREEN, pages)
    w.group("4. A picture of your own", BROWN, picture, small)
    w.group("5. Twice its size", GREEN, large, saved)


def images_in_a_text(w) -> None:
    w.note(0, -420, (820, 280), "Images in a text")
    model = load(w)
    dream = w.add("MMInterleavedLoadDream", 0, 290, (300, 80), model="starter")
    picture = w.add("MMInterleavedExampleImage", 0, 470, (300, 360))
    text = w.add(
        "MMInterleavedStoryText",
        420,
        0,
        (340, 180),
        text="Otto is a lion in a blue coat with glasses. Otto sits by the castle with a cake. It is night.",
    )
    ready = w.add(
        "MMInterleavedSynchronize",
        420,
        290,
        (340, 340),
        llm=model[1],
        synchronizer=model[2],
        model=model[3],
        story=text[0],
    )
    latent = w.add("EmptyLatentImage", 420, 740, (340, 140), width=128, height=128)
    other = sample(w, ready, latent, model, 860, 0, seed=3)
    shown = w.add("PreviewImage", 860, 700, (320, 320), images=other[1][0])
    results = []
    texts = ("{A} in {B}.", "{A} and {B} wave on the beach with a kite.", "{A} in a red coat.")
    for number, sentence in enumerate(texts):
        y = 620 * number
        images = {"A": picture[0]} if "{B}" not in sentence else {"A": picture[0], "B": other[1][0]}
        asked = w.add(
            "MMInterleavedDrawInContext",
            1300,
            y,
            (360, 330),
            dream=dream[0],
            encoder=model[0],
            llm=model[1],
            synchronizer=model[2],
            model=model[3],
            text=sentence,
            **images,
        )
        drawn = sample(w, asked, latent, model, 1760, y, 5, (1300, y + 420))
        saved = w.add("SaveImage", 2180, y, (380, 440), images=drawn[1][0], filename_prefix="stories/in-context")
        results.append((asked, *drawn, saved))
    w.group("1. Model and image A", BLUE, model, dream, picture)
    w.group("2. Image B", BROWN, text, ready, latent, *other, shown)
    w.group("3. The hero of A in the place of B", PURPLE, *results[0])
    w.group("4. Both heroes", PURPLE, *results[1])
    w.group("5. A, with one thing changed", PURPLE, *results[2])


def sample(w, ready, latent, model, x: int, y: int, seed: int, decode=None, **inputs):
    """KSampler and VAE Decode, which is below it or at `decode`."""
    drawn = w.add(
        "KSampler",
        x,
        y,
        (320, 480),
        model=ready[0],
        positive=ready[1],
        negative=ready[2],
        latent_image=latent[0],
        seed=seed,
        steps=20,
        cfg=3.0,
        sampler_name="dpmpp_2m",
        scheduler="karras",
        **inputs,
    )
    return drawn, w.add("VAEDecode", *(decode or (x, y + 560)), (320, 80), samples=drawn[0], vae=model[4])


def an_image_in_400_bytes(w) -> None:
    w.note(0, -380, (760, 240), "An image in 400 bytes")
    model = load(w)
    tokens = w.add("MMInterleavedLoadImageTokens", 0, 290, (300, 80), model="starter")
    picture = w.add("MMInterleavedExampleImage", 420, 0, (320, 360))
    small = w.add(
        "ImageScale",
        420,
        460,
        (320, 170),
        image=picture[0],
        upscale_method="area",
        width=128,
        height=128,
        crop="center",
    )
    latent = w.add("VAEEncode", 860, 0, (320, 80), pixels=small[0], vae=model[4])
    coded = w.add("MMInterleavedImageTokens", 860, 190, (320, 120), image_tokens=tokens[0], latent=latent[0])
    decoded = w.add("VAEDecode", 860, 420, (320, 80), samples=coded[1], vae=model[4])
    saved = w.add("SaveImage", 1300, 0, (380, 440), images=decoded[0], filename_prefix="stories/codes")
    w.group("1. Models", BLUE, model, tokens)
    w.group("2. A picture of your own", BROWN, picture, small)
    w.group("3. As codes, and back", PURPLE, latent, coded, decoded)
    w.group("4. The picture", GREEN, saved)


TEMPLATES = {
    "An image in 400 bytes": an_image_in_400_bytes,
    "Best of four": best_of_four,
    "Drafts": drafts,
    "Find an image": find_an_image,
    "Ideas and variations": ideas_and_variations,
    "Images in a text": images_in_a_text,
    "Look inside": look_inside,
    "Redraw one thing": redraw_one_thing,
    "Round trip": round_trip,
    "Sound over a panel": sound_over_a_panel,
    "Twice the size": twice_the_size,
}
