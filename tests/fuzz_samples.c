/* Any bytes give an error that names its place, or samples within their bounds. */
#include "calibration/samples.h"

#include <stdlib.h>
#include <string.h>

enum { VOCAB = 512, MAX_LEN = 64 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct samples s;
    struct samples_split p;
    struct err_msg why = {""};
    if (size < 1)
        return 0;
    FILE *in = fmemopen((void *)data, size, "r"); /* read only */
    if (!in)
        return 0;
    if (samples_read(&s, in, "input", VOCAB, MAX_LEN, &why) < 0) {
        if (!strstr(why.text, "input"))
            abort();
    } else {
        samples_split(&p, &s, "a", 2, 2);
        if (s.n < 1 || p.n_calibrate + p.n_held_out > s.n || p.n_calibrate > 2)
            abort();
        if (samples_longest(&s, p.calibrate, p.n_calibrate) > MAX_LEN ||
            samples_longest_answered(&s, p.calibrate, p.n_calibrate) >
                MAX_LEN + SAMPLES_MAX_ANSWER ||
            samples_check(&s, "input", VOCAB, NULL) < 0)
            abort();
        samples_split_free(&p);
        samples_free(&s);
    }
    (void)fclose(in);
    return 0;
}
