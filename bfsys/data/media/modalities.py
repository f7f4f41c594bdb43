"""The kinds of files that can be decoded: a modality is a row in this table.

The model never decodes a file and is never told the modality. Files are decoded only to write them in another encoding,
to augment or jitter them, and for the content loss. Rejected alternative: decoding through torchvision and torchaudio,
whose results and back ends change between releases.
"""

# The extensions of each modality, in lower case. A file with an extension of another one is rejected without decoding.
EXTENSIONS = {
    "image": ("jpg", "jpeg", "png", "tif", "tiff", "bmp", "gif", "webp", "ppm", "pgm"),
    "audio": ("wav", "flac", "mp3", "ogg", "opus", "aif", "aiff", "au"),
}
