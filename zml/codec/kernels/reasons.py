"""Why a frame's body is refused: kernels return the negative of these numbers."""

DENSE_SHORT = 1
DENSE_LONG = 2
DENSE_VALUE = 3
HEAD_SHORT = 4
INDEX_CODING = 5
VALUE_CODING = 6
RESERVED = 7
COUNT = 8
NOTHING = 9
VALUES_SHORT = 10
NOT_ALL = 11
DENSE_INDEX = 12
LZ4_SIZE = 13
LZ4_BLOCK = 14
GAPS_SHORT = 15
GAPS_LONG = 16
OFFSETS_SIZE = 17
OFFSETS_COUNT = 18
OFFSETS_ORDER = 19
OFFSETS_PADDING = 20
RICE_SHORT = 21
RICE_LONG = 22
BITMAP_SIZE = 23
BITMAP_COUNT = 24
OUTSIDE = 25
FOREIGN = 26
VALUE = 27
SCALE = 28
LEVELS = 29
PADDING = 30
OVERFLOW = 31

SENTENCES = {
    DENSE_SHORT: "the body ends within the elements of vectors",
    DENSE_LONG: "bytes follow the elements of vectors in a chunk that has nothing else",
    DENSE_VALUE: "an element of a vector is not finite",
    HEAD_SHORT: "the body ends within codings and count",
    INDEX_CODING: "there is no such coding of positions",
    VALUE_CODING: "there is no such coding of values",
    RESERVED: "a reserved bit is set",
    COUNT: "there are more entries than elements",
    NOTHING: "there are no entries, but something is said of them",
    VALUES_SHORT: "the body has no room for its values",
    NOT_ALL: "all elements are announced, but others are counted",
    DENSE_INDEX: "all elements are announced, and positions given",
    LZ4_SIZE: "the positions cannot have this size",
    LZ4_BLOCK: "the positions are no LZ4 block of their size",
    GAPS_SHORT: "the gaps end before the last position",
    GAPS_LONG: "gaps follow the last position",
    OFFSETS_SIZE: "the offsets have another size",
    OFFSETS_COUNT: "the blocks have other entries together",
    OFFSETS_ORDER: "the offsets of a block do not ascend",
    OFFSETS_PADDING: "bits follow the last offset",
    RICE_SHORT: "the Rice code ends before the last position",
    RICE_LONG: "bits follow the last position",
    BITMAP_SIZE: "the bitmap has another size",
    BITMAP_COUNT: "the bitmap has other entries",
    OUTSIDE: "a position lies outside the chunk",
    FOREIGN: "a position lies in a vector",
    VALUE: "a value is not finite",
    SCALE: "a scale is negative or not finite",
    LEVELS: "a scale leads beyond what is finite",
    PADDING: "bits follow the last value",
    OVERFLOW: "an element would no longer be finite",
}
