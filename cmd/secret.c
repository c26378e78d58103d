#include "cmd/secret.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#define SPACE " \t\r\n"

int secret_read(char *buf, size_t cap, const char *option, const char *path, struct err_msg *why)
{
    char line[1024] = "";
    FILE *f = fopen(path, "re");
    if (!f)
        return err_set(why, -errno, "--%s: cannot open %s: %s", option, path, err_str(-errno));
    bool ok = fgets(line, sizeof line, f) != NULL;
    (void)fclose(f);
    char *begin = line + strspn(line, SPACE);
    size_t len = strlen(begin);
    while (len > 0 && strchr(SPACE, begin[len - 1]))
        len--;
    begin[len] = '\0';
    if (!ok || len == 0)
        return err_set(why, ERR_CONFIG, "--%s: %s is empty", option, path);
    if (len >= cap)
        return err_set(why, ERR_CONFIG, "--%s: %s has more than %zu bytes", option, path, cap - 1);
    memcpy(buf, begin, len + 1);
    return 0;
}
