#include "calibration/calib_device.h"

int calib_device_create(struct calib_device **out, const struct calib_config *cfg,
                        struct err_msg *why)
{
    (void)cfg;
    *out = NULL;
    return err_set(why, ERR_UNSUPPORTED, "calibration: this build has no CUDA device");
}

void calib_device_destroy(struct calib_device *d)
{
    (void)d;
}

int calib_device_tiles(struct calib_device *d, const struct model_tiles *tiles)
{
    (void)d;
    (void)tiles;
    return ERR_UNSUPPORTED;
}

int calib_device_fetch(struct calib_device *d, double *t)
{
    (void)d;
    (void)t;
    return ERR_UNSUPPORTED;
}
