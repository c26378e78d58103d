#include "scheduler/request.h"

const char *req_finish_name(enum req_finish f)
{
    switch (f) {
    case REQ_FINISH_NONE: return "none";
    case REQ_FINISH_STOP: return "stop";
    case REQ_FINISH_LENGTH: return "length";
    case REQ_FINISH_CANCELLED: return "cancelled";
    case REQ_FINISH_DEADLINE: return "deadline";
    case REQ_FINISH_CAPACITY: return "capacity";
    case REQ_FINISH_ERROR: return "error";
    case REQ_FINISH_SHUTDOWN: return "shutdown";
    }
    return "unknown";
}
