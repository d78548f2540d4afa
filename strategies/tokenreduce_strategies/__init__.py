"""The built-in strategies, one file each."""

from typing import Any

from tokenreduce.hookspecs import Register, hookimpl


def _official(*counts: int, **options: Any) -> dict[str, dict[str, Any]]:
    """Presets of the counts that the authors report, with their options."""
    return {f"official-{count}": {"keep": count, **options} for count in counts}


@hookimpl
def register_strategies(register: Register) -> None:
    """Register the built-in strategies."""
    here = "tokenreduce_strategies"
    register(
        "lftr",
        f"{here}.lftr:LFTR",
        summary="Merges along time, groups around representatives, drops what says least.",
        sites=("projector", "decoder"),
        kind="merge",
        cost="graph",
        parity="none",
        paper="2501.17391",
    )
    register(
        "norm-topk",
        f"{here}.norm_topk:NormTopK",
        summary="Keeps the tokens of largest norm.",
        sites=("projector", "decoder"),
        kind="prune",
        cost="score",
        parity="none",
        compiles=True,
    )
    register(
        "divprune",
        f"{here}.divprune:DivPrune",
        summary="Keeps the most diverse tokens: greedy max-min cosine distance.",
        sites=("frames", "projector", "decoder"),
        kind="prune",
        cost="greedy",
        parity="official",
        paper="2503.02175",
    )
    register(
        "tome",
        f"{here}.tome:ToMe",
        summary="Merges similar tokens by rounds of bipartite soft matching.",
        sites=("vision", "projector", "decoder"),
        kind="merge",
        cost="bipartite",
        uses=("keys",),
        parity="official",
        paper="2210.09461",
    )
    register(
        "fastervlm",
        f"{here}.fastervlm:FasterVLM",
        summary="Keeps the tokens that the class token attends to most.",
        kind="prune",
        cost="score",
        reads_features=False,
        needs=("class_attention",),
        parity="official",
        paper="2412.01818",
    )
    register(
        "visionzip",
        f"{here}.visionzip:VisionZip",
        summary="Keeps dominant tokens by class attention, merges the rest into spaced ones.",
        kind="merge",
        cost="neighbor",
        needs=("class_attention", "keys"),
        parity="official",
        paper="2412.04467",
        presets=_official(64, 128, 192, official=True),
    )
    register(
        "cdpruner",
        f"{here}.cdpruner:CDPruner",
        summary="Keeps relevant and diverse tokens: greedy determinant conditional on the prompt.",
        kind="prune",
        cost="greedy",
        needs=("joint_image_embeddings", "joint_text_embeddings"),
        parity="official",
        paper="2506.10967",
        presets=_official(32, 64, 128, official=True),
    )
    register(
        "scope",
        f"{here}.scope:Scope",
        summary="Keeps tokens that cover the image, weighted by class attention.",
        kind="prune",
        cost="coverage",
        needs=("class_attention",),
        parity="official",
        paper="2510.24214",
    )
    register(
        "vispruner",
        f"{here}.vispruner:VisPruner",
        summary="Keeps attended tokens, and diverse ones of the rest by step-wise thinning.",
        kind="prune",
        cost="removal",
        needs=("class_attention",),
        parity="official",
        paper="2412.01818",
        presets=_official(32, 64, 128, important=0.5, official=True),
    )
    register(
        "prumerge",
        f"{here}.prumerge:PruMerge",
        summary="Keeps outliers of the class attention, with the others merged into them.",
        kind="merge",
        count="adaptive",
        cost="neighbor",
        needs=("class_attention", "keys"),
        parity="official",
        paper="2403.15388",
        presets={"official": {"official": True}},
    )
    register(
        "prumerge-plus",
        f"{here}.prumerge_plus:PruMergePlus",
        summary="PruMerge with evenly spaced tokens beside the outliers.",
        kind="merge",
        count="adaptive",
        cost="neighbor",
        needs=("class_attention", "keys"),
        parity="official",
        paper="2403.15388",
        presets={"official": {"official": True}},
    )
    register(
        "trim",
        f"{here}.trim:Trim",
        summary="Keeps tokens relevant to the prompt, and the mean of the others.",
        kind="merge",
        count="adaptive",
        cost="score",
        needs=("joint_image_embeddings", "joint_text_embeddings"),
        parity="official",
        paper="2409.10994",
        presets={"official": {"official": True}},
    )
    register(
        "hired",
        f"{here}.hired:HiRED",
        summary="Keeps attended tokens, tile by tile, on budgets that the thumbnail sets.",
        kind="prune",
        cost="score",
        reads_features=False,
        needs=("class_attention",),
        parity="official",
        paper="2408.10945",
        presets={
            "official-0.2": {
                "keep_ratio": 0.2,
                "alpha": 0.5,
                "shallow": "shallow_class_attention",
                "official": True,
            }
        },
    )
    register(
        "gprune",
        f"{here}.gprune:GPrune",
        summary="Keeps tokens in which information gathers on a graph of similar tokens.",
        kind="prune",
        cost="graph",
        parity="official",
        paper="2501.02268",
    )
    register(
        "folder",
        f"{here}.folder:Folder",
        summary="Merges similar tokens by folding: bipartite matching, halving repeatedly.",
        kind="merge",
        cost="bipartite",
        parity="official",
        paper="2501.02430",
        presets={"official-0.5": {"keep_ratio": 0.5, "official": True}},
    )
    register(
        "prunesid",
        f"{here}.prunesid:PruneSID",
        summary="Keeps important, diverse tokens of every principal component.",
        kind="prune",
        cost="removal",
        needs=("class_attention",),
        parity="official",
        paper="2603.09480",
        presets=_official(64, 128, 192, official=True),
    )
    register(
        "mmr",
        f"{here}.mmr:MMR",
        summary="Keeps tokens of high score, unlike each other: maximal marginal relevance.",
        kind="prune",
        cost="greedy",
        needs=("class_attention",),
        parity="none",
    )
    register(
        "greedyprune",
        f"{here}.greedyprune:GreedyPrune",
        summary="Keeps tokens that matter to the prompt and do not repeat each other.",
        kind="prune",
        cost="greedy",
        needs=("prompt_embeddings",),
        parity="description",
        paper="2506.13166",
    )
    register(
        "otprune",
        f"{here}.otprune:OTPrune",
        summary="Keeps tokens distributed like all of them: greedy log-determinant.",
        kind="prune",
        cost="graph",
        parity="official",
        paper="2602.20205",
        presets={"official-0.098": {"keep_ratio": 0.098}},
    )
    register(
        "holov",
        f"{here}.holov:HoloV",
        summary="Keeps attended tokens of every region, on budgets by attention and variety.",
        kind="prune",
        cost="neighbor",
        needs=("class_attention",),
        parity="official",
        paper="2510.02912",
        presets=_official(64, regions=16, official=True),
    )
    register(
        "mmtok",
        f"{here}.mmtok:MMTok",
        summary="Keeps tokens that together cover the prompt and the image.",
        kind="prune",
        cost="coverage",
        needs=("prompt_embeddings",),
        parity="official",
        paper="2508.18264",
        presets=_official(64, 128, 192, image="vision_features", text_temperature=0.02),
    )
    register(
        "vscan",
        f"{here}.vscan:VScan",
        summary="Keeps tokens of local and of global attention, merges the rest into them.",
        kind="merge",
        cost="neighbor",
        needs=("class_attention", "shallow_class_attention"),
        needs_grid=True,
        parity="official",
        paper="2505.22654",
        presets=_official(96, windows=4, official=True),
    )
    register(
        "rank-fusion",
        f"{here}.rank_fusion:RankFusion",
        summary="Keeps the tokens that rank high by two scores at once.",
        kind="prune",
        cost="score",
        reads_features=False,
        needs=("class_attention", "received_attention"),
        parity="none",
        paper="2505.11945",
    )
    register(
        "text-guided-sampler",
        f"{here}.text_guided_sampler:TextGuidedSampler",
        summary="Keeps the tokens that words of the prompt are most similar to.",
        kind="prune",
        cost="score",
        needs=("prompt_embeddings",),
        parity="none",
        paper="2411.14228",
    )
    register(
        "text-drop-mask",
        f"{here}.text_drop_mask:TextDropMask",
        summary="Drops the tokens that the words of the prompt leave out.",
        kind="prune",
        count="adaptive",
        cost="score",
        needs=("prompt_embeddings",),
        parity="description",
        paper="2410.17779",
    )
    register(
        "density-peak-grouping",
        f"{here}.density_peak_grouping:DensityPeakGrouping",
        summary="Merges groups of tokens around density peaks.",
        kind="merge",
        cost="graph",
        parity="none",
    )
    register(
        "token-grouping",
        f"{here}.token_grouping:TokenGrouping",
        summary="Merges tokens into learned groups; needs trained weights.",
        kind="merge",
        count="adaptive",
        cost="score",
        needs_weights=True,
        parity="none",
        paper="2411.17773",
    )
    register(
        "space-to-depth",
        f"{here}.space_to_depth:SpaceToDepth",
        summary="Folds blocks of tokens into one by a projection; needs trained weights.",
        kind="merge",
        count="layout",
        cost="score",
        needs_grid=True,
        needs_weights=True,
        parity="none",
        paper="2412.09604",
    )
    register(
        "dymu",
        f"{here}.dymu:DyMU",
        summary="Merges the pairs of a bipartite matching that exceed a similarity.",
        sites=("vision", "projector"),
        kind="merge",
        count="adaptive",
        cost="bipartite",
        uses=("keys",),
        parity="official",
        paper="2504.17040",
    )
    register(
        "pitome",
        f"{here}.pitome:PiToMe",
        summary="Merges tokens that have many alike, protects those that have few.",
        sites=("vision", "projector"),
        kind="merge",
        cost="graph",
        uses=("keys",),
        parity="description",
        paper="2405.16148",
    )
    register(
        "fastv",
        f"{here}.fastv:FastV",
        summary="Keeps what the prompt's last token attends to in an early LLM layer.",
        sites=("decoder",),
        kind="prune",
        cost="score",
        reads_features=False,
        needs=("last_token_attention",),
        parity="description",
        paper="2403.06764",
        presets={
            f"official-k{layer}-r50": {"site": "decoder", "layer": layer, "keep_ratio": 0.5}
            for layer in (2, 3)
        },
    )
    register(
        "pyramiddrop",
        f"{here}.pyramiddrop:PyramidDrop",
        summary="Keeps what the instruction's last token attends to, cut by cut.",
        sites=("decoder",),
        kind="prune",
        cost="score",
        reads_features=False,
        needs=("last_token_attention",),
        parity="official",
        paper="2410.17247",
        presets={
            "official": {"site": "decoder", "schedule": {8: 0.5, 16: 0.25, 24: 0.125}},
            "any-depth": {"site": "decoder", "schedule": {0.25: 0.5, 0.5: 0.25, 0.75: 0.125}},
        },
    )
    register(
        "sparsevlm",
        f"{here}.sparsevlm:SparseVLM",
        summary="Keeps what relevant words attend to, recycles part of the rest into clusters.",
        sites=("decoder",),
        kind="merge",
        cost="neighbor",
        needs=("prompt_attention", "prompt_states"),
        parity="official",
        paper="2410.04417",
        presets={
            f"official-{count}": {
                "site": "decoder",
                # What its table for each layer retains, and the clusters beside that.
                "schedule": {
                    layer: f"{kept}/576" for layer, kept in zip((3, 7, 16), cuts, strict=True)
                },
            }
            for count, cuts in ((64, (82, 32, 18)), (128, (312, 117, 39)), (192, (309, 204, 113)))
        },
    )
    register(
        "dart",
        f"{here}.dart:DART",
        summary="Keeps a few pivot tokens, and those that duplicate them least.",
        sites=("decoder",),
        kind="prune",
        cost="score",
        needs=("decoder_keys", "prompt_keys", "prompt_states"),
        parity="official",
        paper="2502.11494",
        presets={
            f"official-{count}": {
                "site": "decoder",
                "layer": 2,
                "pivots": 4,
                "keep_ratio": ratio,
                "official": True,
            }
            for count, ratio in ((64, 0.111), (128, 0.222), (192, 0.333))
        },
    )
    register(
        "feather",
        f"{here}.feather:Feather",
        summary="Keeps an even grid, and what attention without rotary embedding finds.",
        sites=("decoder",),
        kind="prune",
        cost="score",
        reads_features=False,
        needs=("unrotated_attention",),
        parity="official",
        paper="2412.13180",
        presets={
            # Two cuts: the grid and 30 percent by attention, then 9 percent by attention alone.
            "official-8": {
                "site": "decoder",
                "layer": 8,
                "keep_ratio": 0.3,
                "stride": 3,
                "official": True,
            },
            "official-16": {
                "site": "decoder",
                "layer": 16,
                "keep_ratio": 0.09,
                "stride": 0,
                "official": True,
            },
        },
    )
    register(
        "tokencarve",
        f"{here}.tokencarve:TokenCarve",
        summary="Keeps informative, attended tokens, and merges the next best into them.",
        sites=("decoder",),
        kind="merge",
        cost="decomposition",
        needs=("last_token_attention",),
        parity="official",
        paper="2503.10501",
        presets={
            "official-64": {"site": "decoder", "layer": 2, "keep": 64, "official": True},
        },
    )
    register(
        "pact",
        f"{here}.pact:PACT",
        summary="Drops tokens of small states, clusters the others within a radius.",
        sites=("decoder",),
        kind="merge",
        count="adaptive",
        cost="graph",
        needs=("decoder_keys",),
        parity="official",
        paper="2504.08966",
        presets={
            "official": {"site": "decoder", "layer": 4, "radius": 0.21, "important": 0.55},
        },
    )
    register(
        "vtw",
        f"{here}.vtw:VTW",
        summary="Withdraws all visual tokens after a layer of the LLM.",
        sites=("decoder",),
        kind="prune",
        count="adaptive",
        cost="score",
        reads_features=False,
        parity="description",
        paper="2405.05803",
        presets={"official-k15": {"site": "decoder", "schedule": {15: 0}}},
    )
    register(
        "dyvte",
        f"{here}.dyvte:DyVTE",
        summary="Drops all visual tokens when a trained router says so; needs its weights.",
        sites=("decoder",),
        kind="prune",
        count="adaptive",
        cost="score",
        reads_features=False,
        needs=("prompt_states",),
        needs_weights=True,
        parity="description",
        paper="2411.19628",
    )
    register(
        "framefusion-prune",
        f"{here}.framefusion_prune:FrameFusionPrune",
        summary="Keeps what gets most attention from all others in an LLM layer.",
        sites=("decoder",),
        kind="prune",
        cost="score",
        reads_features=False,
        needs=("decoder_received_attention",),
        parity="official",
        paper="2501.01986",
    )
    register(
        "free-video-llm",
        f"{here}.free_video_llm:FreeVideoLLM",
        summary="Keeps the frames, and the region of each, that the prompt is about.",
        kind="prune",
        cost="score",
        needs=("joint_image_embeddings", "joint_text_embeddings"),
        needs_grid=True,
        parity="official",
        paper="2410.10441",
    )
    register(
        "random",
        f"{here}.random_keep:RandomKeep",
        summary="Control: keeps random tokens, seeded by content.",
        sites=("frames", "projector", "decoder"),
        kind="prune",
        cost="score",
    )
    register(
        "uniform",
        f"{here}.uniform:Uniform",
        summary="Control: keeps evenly spaced tokens.",
        sites=("frames", "projector", "decoder"),
        kind="prune",
        cost="score",
        reads_features=False,
    )
    register(
        "avg-pool",
        f"{here}.avg_pool:AvgPool",
        summary="Control: averages neighbouring tokens of the grid.",
        kind="merge",
        count="layout",
        cost="score",
        needs_grid=True,
    )
    register(
        "bilinear-pool",
        f"{here}.bilinear_pool:BilinearPool",
        summary="Resizes the token grid by bilinear interpolation.",
        kind="merge",
        count="layout",
        cost="score",
        needs_grid=True,
        paper="2602.05275",
    )
    register(
        "evs",
        f"{here}.evs:EVS",
        summary="Keeps the first frame of a clip, and what changes from frame to frame.",
        kind="prune",
        cost="score",
        needs_grid=True,
        parity="official",
        paper="2510.14624",
        presets={"official-0.25": {"keep_ratio": 0.25, "official": True}},
    )
    register(
        "vidcom2",
        f"{here}.vidcom2:VidCom2",
        summary="Keeps what is unusual in its frame and in the video, more of unusual frames.",
        kind="prune",
        cost="per_frame",
        needs_grid=True,
        parity="official",
        paper="2505.14454",
        presets={"official-0.25": {"keep_ratio": 0.25, "official": True}},
    )
    register(
        "dycoke",
        f"{here}.dycoke:DyCoke",
        summary="In groups of four frames, later ones keep what their forerunner lacks.",
        kind="prune",
        cost="score",
        needs_grid=True,
        parity="official",
        paper="2411.15024",
        presets={"official": {"official": True, "merging_ratio": 0.7}},
    )
    register(
        "aim",
        f"{here}.aim:AIM",
        summary="Merges similar tokens within each frame (the part before the LLM).",
        kind="merge",
        cost="per_frame",
        needs_grid=True,
        parity="official",
        paper="2412.03248",
        presets={"official": {"keep_ratio": 0.25, "official": True}},
    )
    register(
        "aim-prune",
        f"{here}.aim_prune:AIMPrune",
        summary="Keeps the tokens of highest PageRank in the attention of an LLM layer.",
        sites=("decoder",),
        kind="prune",
        cost="score",
        reads_features=False,
        needs=("attention_page_rank",),
        parity="official",
        paper="2412.03248",
        presets={
            "official": {
                "site": "decoder",
                "schedule": {14 + i: 1 - i / 8 for i in range(1, 9)},
            }
        },
    )
    register(
        "flashvid",
        f"{here}.flashvid:FlashVID",
        summary="Keeps salient diverse tokens of each frame, and merges the others in trees.",
        kind="merge",
        cost="per_frame",
        needs=("class_attention",),
        needs_grid=True,
        parity="official",
        paper="2602.08024",
    )
    register(
        "scissor",
        f"{here}.scissor:Scissor",
        summary="Merges connected components of similar tokens, in frames and over time.",
        kind="merge",
        count="adaptive",
        cost="per_frame",
        needs_grid=True,
        parity="official",
        paper="2506.21862",
    )
    register(
        "sttm",
        f"{here}.sttm:STTM",
        summary="Merges uniform regions of frames by quadtrees, and what stays alike over time.",
        kind="merge",
        count="adaptive",
        cost="per_frame",
        needs_grid=True,
        parity="official",
        paper="2507.07990",
        presets={"official": {"official": True}},
    )
    register(
        "holitom",
        f"{here}.holitom:HoliTom",
        summary="Merges what stands still in windows of frames, thins the rest by attention.",
        kind="merge",
        cost="per_frame",
        needs=("class_attention",),
        needs_grid=True,
        parity="official",
        paper="2505.21334",
        presets={"official-0.1": {"keep_ratio": 0.1, "official": True}},
    )
    register(
        "framefusion",
        f"{here}.framefusion:FrameFusion",
        summary="Merges runs of tokens that repeat the frame before.",
        sites=("projector", "decoder"),
        kind="merge",
        count="adaptive",
        cost="score",
        needs_grid=True,
        parity="official",
        paper="2501.01986",
    )
    register(
        "vcast",
        f"{here}.vcast:VCAST",
        summary="Keeps what stands out in its frame, more where the video turns.",
        kind="prune",
        cost="score",
        needs_grid=True,
        parity="description",
        paper="2603.27650",
        presets={"official-0.25": {"keep_ratio": 0.25, "official": True}},
    )
    register(
        "fastvid",
        f"{here}.fastvid:FastVID",
        summary="Keeps salient tokens, merges the rest of each segment into density peaks.",
        kind="merge",
        cost="per_frame",
        needs=("class_attention",),
        needs_grid=True,
        parity="description",
        paper="2503.11187",
    )
    register(
        "prunevid",
        f"{here}.prunevid:PruneVid",
        summary="Merges still places of scenes over time, and similar tokens in space.",
        kind="merge",
        cost="per_frame",
        needs_grid=True,
        parity="description",
        paper="2412.16117",
    )
    for name, wrapper, summary, count in (
        ("per-frame", "PerFrame", "Applies an image strategy to each frame.", "exact"),
        ("per-tile", "PerTile", "Applies a strategy to each tile or crop.", "exact"),
        ("per-segment", "PerSegment", "Applies a video strategy to runs of frames.", "exact"),
        ("chain", "Chain", "Applies strategies one after another.", "adaptive"),
    ):
        register(
            name,
            f"tokenreduce.wrappers:{wrapper}",
            summary=summary,
            kind="merge",
            count=count,
            reads_features=False,
            wraps=True,
        )
    register(
        "denoising-schedule",
        f"{here}.denoising_schedule:DenoisingSchedule",
        summary="Applies a strategy from a denoising step of a diffusion model on.",
        kind="merge",
        reads_features=False,
        wraps=True,
        paper="2511.15098",
    )
