"""What attention over records is compared with, one library a file."""

from peers.flash_infer import FlashInferPeer
from peers.flex import FlexPeer
from peers.published import PublishedPeer
from peers.sdpa import sdpa_peers


def all_peers():
    """Every peer. Whether it can be imported shows when it is used."""
    return [
        *sdpa_peers(),
        FlexPeer(),
        FlashInferPeer("fp16"),
        FlashInferPeer("fp8"),
        PublishedPeer(),
    ]
