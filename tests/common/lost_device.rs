//! A Vulkan driver that loses its device: another driver behind it (`REAL_DRIVER`), until as many submissions as
//! `LOST_AFTER` says are done. `tests/webgpu.rs` builds it.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    mem::transmute,
    ptr::null_mut,
    sync::{
        OnceLock,
        atomic::{AtomicI64, AtomicPtr, Ordering},
    },
};

type Lookup = unsafe extern "C" fn(*mut c_void, *const c_char) -> *mut c_void;
type Submit = unsafe extern "C" fn(*mut c_void, u32, *const c_void, *mut c_void) -> c_int;

const ERROR_DEVICE_LOST: c_int = -4;

static LEFT: OnceLock<AtomicI64> = OnceLock::new();
static REAL_LOOKUP: AtomicPtr<c_void> = AtomicPtr::new(null_mut());
static REAL_SUBMIT: AtomicPtr<c_void> = AtomicPtr::new(null_mut());

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// A function of the driver behind.
unsafe fn real(name: &CStr) -> *mut c_void {
    let path = CString::new(std::env::var("REAL_DRIVER").unwrap()).unwrap();
    unsafe { dlsym(dlopen(path.as_ptr(), 2), name.as_ptr()) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vk_icdNegotiateLoaderICDInterfaceVersion(version: *mut u32) -> c_int {
    let negotiate = unsafe { real(c"vk_icdNegotiateLoaderICDInterfaceVersion") };
    unsafe { transmute::<*mut c_void, unsafe extern "C" fn(*mut u32) -> c_int>(negotiate)(version) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vk_icdGetPhysicalDeviceProcAddr(instance: *mut c_void, name: *const c_char) -> *mut c_void {
    let lookup = unsafe { real(c"vk_icdGetPhysicalDeviceProcAddr") };
    if lookup.is_null() { null_mut() } else { unsafe { transmute::<*mut c_void, Lookup>(lookup)(instance, name) } }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vk_icdGetInstanceProcAddr(instance: *mut c_void, name: *const c_char) -> *mut c_void {
    let found = unsafe { transmute::<*mut c_void, Lookup>(real(c"vk_icdGetInstanceProcAddr"))(instance, name) };
    match unsafe { CStr::from_ptr(name) }.to_bytes() {
        b"vkGetDeviceProcAddr" => {
            REAL_LOOKUP.store(found, Ordering::SeqCst);
            device_function as *mut c_void
        }
        b"vkQueueSubmit" => {
            REAL_SUBMIT.store(found, Ordering::SeqCst);
            submit as *mut c_void
        }
        _ => found,
    }
}

unsafe extern "C" fn device_function(device: *mut c_void, name: *const c_char) -> *mut c_void {
    let lookup: Lookup = unsafe { transmute(REAL_LOOKUP.load(Ordering::SeqCst)) };
    let found = unsafe { lookup(device, name) };
    if unsafe { CStr::from_ptr(name) }.to_bytes() != b"vkQueueSubmit" {
        return found;
    }
    REAL_SUBMIT.store(found, Ordering::SeqCst);
    submit as *mut c_void
}

unsafe extern "C" fn submit(queue: *mut c_void, count: u32, what: *const c_void, fence: *mut c_void) -> c_int {
    let left = LEFT.get_or_init(|| AtomicI64::new(std::env::var("LOST_AFTER").unwrap().parse().unwrap()));
    if left.fetch_sub(1, Ordering::SeqCst) <= 0 {
        return ERROR_DEVICE_LOST;
    }
    let real: Submit = unsafe { transmute(REAL_SUBMIT.load(Ordering::SeqCst)) };
    unsafe { real(queue, count, what, fence) }
}
