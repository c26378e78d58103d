/* Any bytes, in any pieces, give frames within the limit or an error: the first byte chooses the
 * limit, the second the size of the pieces. */
#include "ipc/frame.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct ipc_frame_reader r;
    const uint8_t *p;
    size_t len;
    int rc = 0;
    if (size < 2)
        return 0;
    size_t limit = (size_t)data[0] << 8 | 1, piece = data[1] + 1u, taken = 2;
    ipc_frame_reader_init(&r, limit);
    while (taken < size && rc >= 0) {
        uint8_t *room;
        size_t n, want = piece < size - taken ? piece : size - taken;
        if (ipc_frame_reader_space(&r, &room, &n) < 0)
            break;
        n = n < want ? n : want;
        memcpy(room, data + taken, n);
        ipc_frame_reader_commit(&r, n);
        taken += n;
        while ((rc = ipc_frame_reader_next(&r, &p, &len, NULL)) > 0)
            if (len == 0 || len > limit || p < r.buf || p + len > r.buf + r.end)
                abort();
    }
    ipc_frame_reader_deinit(&r);
    return 0;
}
