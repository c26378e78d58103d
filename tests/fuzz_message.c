/* Any payload is read or refused; what was read can be packed, and that is read back as the same
 * bytes: packing is a fixed point after one round. */
#include "ipc/frame.h"
#include "ipc/message.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool ok)
{
    if (!ok)
        abort();
}

static void round_trip(const struct ipc_msg *m)
{
    static struct ipc_msg back;
    struct ipc_decoder *d;
    struct ipc_buf a = {0}, b = {0};
    require(ipc_decoder_create(&d) == 0);
    require(ipc_msg_pack(&a, m, NULL) == 0);
    require(ipc_msg_unpack(d, &back, a.data + IPC_FRAME_HEADER, a.len - IPC_FRAME_HEADER, NULL) ==
            0);
    require(ipc_msg_pack(&b, &back, NULL) == 0);
    require(a.len == b.len && memcmp(a.data, b.data, a.len) == 0);
    ipc_buf_free(&a);
    ipc_buf_free(&b);
    ipc_decoder_destroy(d);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct ipc_msg m;
    struct ipc_decoder *d;
    struct err_msg why = {""};
    require(ipc_decoder_create(&d) == 0);
    int err = ipc_msg_unpack(d, &m, data, size, &why);
    if (err == 0)
        round_trip(&m);
    else
        require(err == ERR_PROTOCOL || err == ERR_INVALID || err == ERR_UNSUPPORTED);
    require(err != ERR_INVALID || why.text[0] != '\0');
    ipc_decoder_destroy(d);
    return 0;
}
