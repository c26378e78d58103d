# Every outside library, as an imported target sluice_<name>.
find_package(PkgConfig REQUIRED)
find_package(Threads REQUIRED)

# sluice_dep(uv MODULES libuv>=1.44 ARCHIVES libuv_a.a): the first pkg-config module found; its static archive when
# SLUICE_STATIC_DEPS is on, else the shared library.
function(sluice_dep name)
  cmake_parse_arguments(A "" "" "MODULES;ARCHIVES" ${ARGN})
  pkg_search_module(${name} REQUIRED ${A_MODULES})
  add_library(sluice_${name} INTERFACE)
  target_include_directories(sluice_${name} SYSTEM INTERFACE ${${name}_INCLUDE_DIRS})
  if(SLUICE_STATIC_DEPS)
    find_library(${name}_ARCHIVE NAMES ${A_ARCHIVES} HINTS ${${name}_STATIC_LIBRARY_DIRS} ${${name}_LIBRARY_DIRS} REQUIRED)
    target_link_libraries(sluice_${name} INTERFACE ${${name}_ARCHIVE} Threads::Threads ${CMAKE_DL_LIBS} m)
  else()
    target_link_directories(sluice_${name} INTERFACE ${${name}_LIBRARY_DIRS})
    target_link_libraries(sluice_${name} INTERFACE ${${name}_LIBRARIES})
  endif()
endfunction()

sluice_dep(uv MODULES libuv>=1.44 ARCHIVES libuv_a.a)
sluice_dep(msgpack MODULES msgpack-c>=4.0 msgpack>=4.0 ARCHIVES libmsgpack-c.a libmsgpackc.a) # renamed in release 6
sluice_dep(jansson MODULES jansson>=2.13 ARCHIVES libjansson.a)
sluice_dep(openblas MODULES openblas ARCHIVES libopenblas.a)
pkg_check_modules(xxhash REQUIRED libxxhash) # header only: XXH_INLINE_ALL
if(SLUICE_METRICS)
  pkg_check_modules(microhttpd REQUIRED libmicrohttpd)
  add_library(sluice_microhttpd INTERFACE)
  target_link_libraries(sluice_microhttpd INTERFACE ${microhttpd_LIBRARIES})
endif()
if(SLUICE_TESTS)
  pkg_check_modules(cmocka cmocka)
  if(NOT cmocka_FOUND)
    message(FATAL_ERROR "cmocka is missing: install it (scripts/setup.sh test) or configure with -DSLUICE_TESTS=OFF")
  endif()
  add_library(sluice_cmocka INTERFACE)
  target_link_libraries(sluice_cmocka INTERFACE ${cmocka_LIBRARIES})
endif()
