#include "model/rope.h"

#include <math.h>

/* Llama 3: long waves are stretched by `factor`, short ones kept, the ones between blended. */
static float llama3_frequency(float f, const struct rope_config *r)
{
    const double two_pi = 6.283185307179586;
    const double old_len = r->original_max_position;
    double wavelen = two_pi / (double)f;

    if (wavelen < old_len / r->high_freq_factor)
        return f;
    if (wavelen > old_len / r->low_freq_factor)
        return f / (float)r->factor;
    float smooth = (float)((old_len / wavelen - r->low_freq_factor) /
                           (r->high_freq_factor - r->low_freq_factor));
    return (1.0f - smooth) * (f / (float)r->factor) + smooth * f;
}

void rope_frequencies(float *inv_freq, const struct rope_config *r, int32_t head_dim)
{
    for (int32_t i = 0; i < head_dim / 2; i++) {
        float exponent = (float)(2 * i) / (float)head_dim;
        float f = 1.0f / (float)pow(r->theta, (double)exponent);
        if (r->type == ROPE_LINEAR)
            f /= (float)r->factor;
        else if (r->type == ROPE_LLAMA3)
            f = llama3_frequency(f, r);
        inv_freq[i] = f;
    }
}

void rope_fill(float *cos_sin, const struct rope_config *r, int32_t head_dim, int64_t n_positions)
{
    float inv_freq[LLAMA_MAX_HEAD_DIM / 2];
    const int32_t half = head_dim / 2;

    rope_frequencies(inv_freq, r, head_dim);
    for (int64_t p = 0; p < n_positions; p++, cos_sin += head_dim) {
        for (int32_t i = 0; i < half; i++) {
            float angle = (float)p * inv_freq[i];
            cos_sin[i] = (float)cos((double)angle);
            cos_sin[half + i] = (float)sin((double)angle);
        }
    }
}
