"""How a server runs: what stands in `[PROFILE.serve]` of a settings file and in the options of `serve` alone.

What a server loads and draws is set by the settings of `declared`, as everywhere.
"""

from dataclasses import dataclass

from zimage.settings.conditions import MOST_CONDITIONS
from zimage.settings.fields import Settings, check_fields, setting

HOST, PORT = "127.0.0.1", 7860
TOKEN = "ZIMAGE_TOKEN"  # the environment variable that holds the token itself


@dataclass(frozen=True)
class ServeSettings(Settings):
    """How a server listens, what it accepts and what it keeps. Raises RequestError with the fields at fault."""

    host: str = setting(HOST, "Address to listen on. Any other than this computer's own needs a token.", group="Server")
    port: int = setting(PORT, "Port to listen on; 0 takes a free one.", group="Server", minimum=0, maximum=65_535)
    token_file: str | None = setting(
        None,
        f"File with the token that every client must send. Default: the variable {TOKEN}, else no token.",
        group="Server",
        metavar="FILE",
        path=True,
    )
    allow_host: list[str] | None = setting(
        None,
        "Name under which browsers reach the server, such as that of a proxy before it; repeat it to allow several. "
        "Default: the address and localhost.",
        group="Server",
        metavar="NAME",
    )
    data: str | None = setting(
        None,
        "Folder for pictures, queue and uploads. Default: zimage in the user's folder for data.",
        group="Server",
        metavar="FOLDER",
        path=True,
    )
    control_folder: str | None = setting(
        None,
        "Folder with the control files that requests may name. Default: none.",
        group="Server",
        metavar="FOLDER",
        path=True,
    )
    worker: list[str] | None = setting(
        None,
        "Device of a worker process; repeat it for several, which share the queue. Default: one, on --device.",
        group="Server",
        metavar="DEVICE",
    )
    encoder_only: bool = setting(
        False, "Only encode and rewrite prompts for other machines; no pictures, no page.", group="Server"
    )
    previews: bool = setting(True, "Show what running jobs are becoming, after every step.", group="Server")
    grace: float = setting(
        30.0,
        "Seconds that a running job may take to end when the server is stopped; then its state is saved.",
        group="Server",
        minimum=0,
        maximum=3600,
    )
    max_queue: int = setting(
        200, "Jobs that may wait; more are refused until there is room.", group="Limits", minimum=1, maximum=100_000
    )
    max_pixels: int = setting(
        4096 * 4096, "Pixels of a picture that may be asked for.", group="Limits", minimum=256, maximum=1 << 28
    )
    max_images: int = setting(16, "Pictures that one job may draw.", group="Limits", minimum=1, maximum=10_000)
    max_conditions: int = setting(
        8,
        "Reference pictures that one job may have, and control pictures.",
        group="Limits",
        minimum=1,
        maximum=MOST_CONDITIONS,
    )
    max_steps: int = setting(200, "Steps that one job may ask for.", group="Limits", minimum=1, maximum=1000)
    max_prompt_tokens: int = setting(
        4096,
        "Tokens that one prompt of a job, its embeddings, or what a rewriter writes may have.",
        group="Limits",
        minimum=64,
        maximum=1_000_000,
    )
    max_upload: int = setting(32, "MiB of a request with its uploads.", group="Limits", minimum=1, maximum=1024)
    max_decoded: int = setting(
        64_000_000,
        "Pixels of an uploaded picture once it is decoded.",
        group="Limits",
        minimum=256,
        maximum=178_956_970,
    )
    idle_timeout: float = setting(
        30.0, "Seconds that a client may pause while it sends a request.", group="Limits", above=0, maximum=3600
    )
    header_timeout: float = setting(
        10.0, "Seconds that the header of a request may take.", group="Limits", above=0, maximum=3600
    )
    min_free: int = setting(
        100,
        "MB that must be free on the disk for a job to be accepted.",
        group="Limits",
        minimum=1,
        maximum=1_000_000,
    )
    keep_days: float | None = setting(
        None, "Days after which pictures are deleted. Default: never.", group="History", above=0, maximum=100_000
    )
    keep_gb: float | None = setting(
        None,
        "GB that pictures may take; the oldest are deleted beyond it. Default: no limit.",
        group="History",
        above=0,
        maximum=1_000_000,
    )
    access_log: bool = setting(False, "Print a line per request, without prompts.", group="Log")
    log_prompts: bool = setting(False, "Also print prompts.", group="Log")

    def __post_init__(self):
        check_fields(self)
